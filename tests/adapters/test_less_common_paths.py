"""What ordinary models do not need, and others do: each way through a layer, a state dict and a selection."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import IN, OUT, TOKENS, R, adapted, plain
from torch import Tensor, nn

from milora_lightning import LoRAConfig, LoRALinear, inject
from milora_lightning.adapters.adapter_state import factors_tell
from milora_lightning.adapters.candidates import layers_named
from milora_lightning.adapters.factors import initial_factors, stack_factors
from milora_lightning.adapters.parts import TargetNotFoundError
from milora_lightning.adapters.targets import find_targets, select_layers


class Doubled(nn.Linear):
    """A linear layer that computes in another way, and in another dtype than its input's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).double()


def test_an_output_of_another_dtype_keeps_it_and_gets_the_update() -> None:
    layer = adapted()
    base = Doubled(IN, OUT)
    base.load_state_dict(layer.base_layer.state_dict())
    x = torch.randn(TOKENS, IN)
    expected = base(x) + (plain(layer, x) - layer.base_layer(x)).double()
    layer.base_layer = base
    assert layer(x).dtype == torch.float64
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_initial_factors_that_train_get_their_gradients() -> None:
    layer, x = adapted(), torch.randn(TOKENS, IN)
    for factor in (layer.initial_A, layer.initial_B):
        factor.requires_grad_(True)
    layer(x).square().sum().backward()
    found = [factor.grad.clone() for factor in layer.factors]
    layer.zero_grad()
    plain(layer, x).square().sum().backward()
    for gradient, factor in zip(found, layer.factors, strict=True):
        torch.testing.assert_close(gradient, factor.grad, rtol=1e-4, atol=1e-4)


def test_a_layer_by_itself_trains_its_factors_alone() -> None:
    layer = LoRALinear(nn.Linear(IN, OUT), R)
    trains = {name: parameter.requires_grad for name, parameter in layer.named_parameters() if "base" not in name}
    assert trains == {"lora_A": True, "lora_B": True, "initial_A": False, "initial_B": False}


@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "initial_A", "initial_B"])
def test_each_factor_that_is_not_zero_tells_of_a_start(factor: str) -> None:
    state = {f"x.{name}": torch.zeros(2, 2) for name in ("lora_A", "lora_B", "initial_A", "initial_B")}
    assert not factors_tell(state, "x.")
    state[f"x.{factor}"][1, 1] = 1e-9
    assert factors_tell(state, "x.")
    assert not factors_tell(state, "y.")


def test_layers_that_are_not_there_are_named_with_those_that_are() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(3, 3)}), "k": nn.Linear(3, 3)})
    assert list(layers_named(model, ["k", "a.q"])) == ["k", "a.q"]
    with pytest.raises(TargetNotFoundError, match=r"'absent' matches no linear layer.*\bk\b"):
        layers_named(model, ["k", "absent"])
    with pytest.raises(TargetNotFoundError, match="ModuleDict has no linear layer 'q'"):
        layers_named(model, ["q"])  # the end of a name is not enough


def test_a_parts_layers_have_their_full_names() -> None:
    model = nn.ModuleDict({"student": nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(2, 2)})})
    config = LoRAConfig(r=3, module="student", rank_pattern={r"student\.a": 2})
    selection = select_layers(model, config)
    assert list(selection.layers) == ["student.a"]
    assert list(selection.left_out) == ["student.b"]
    assert inject(model, config)["student.a"].r == 2


def test_a_layer_named_as_a_language_models_head_is_left_out_without_one() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "lm_head": nn.Linear(3, 3), "my_lm_head": nn.Linear(3, 3)})
    assert list(find_targets(model, "all-linear")) == ["body", "my_lm_head"]


def test_starts_are_where_the_weight_is_whatever_the_default_device() -> None:
    for init in ("lora", "milora"):
        with torch.device("meta"):
            A, B = initial_factors(torch.ones(4, 3, device="cpu"), 2, init=init)
        assert A.device.type == B.device.type == "cpu"


@pytest.mark.parametrize("scaling", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_stacked_factors_are_the_update_in_the_dtype_asked_for(scaling: float, dtype: torch.dtype | None) -> None:
    layer = adapted()
    A, B = stack_factors(*layer.factors, scaling, dtype)
    assert A.dtype == B.dtype == (dtype or torch.float32)
    assert (A.shape, B.shape) == ((2 * R, IN), (OUT, 2 * R))
    update = scaling * (layer.lora_B @ layer.lora_A - layer.initial_B @ layer.initial_A)
    torch.testing.assert_close((B @ A).float(), update, rtol=2e-2, atol=2e-2 if dtype else 1e-5)
