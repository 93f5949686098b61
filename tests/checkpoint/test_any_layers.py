"""Checkpoints of any set of layers bring back what was saved, and fit no other set."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from milora_lightning import CheckpointError, LoRAConfig, initialize, inject, lora_layers
from milora_lightning.checkpoint.adapter import KEY, AdapterCheckpoint, inject_as_in
from milora_lightning.checkpoint.fingerprint import fingerprint
from milora_lightning.checkpoint.reading import check_format

few = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
NUMBER = 5
layers = st.sets(st.sampled_from([str(i) for i in range(NUMBER)]), min_size=1)
options = st.fixed_dictionaries(
    {
        "r": st.integers(1, 4),
        "init": st.sampled_from(["milora", "pissa", "middle", "random", "lora"]),
        "lora_alpha": st.sampled_from([None, 3.0]),
        "modules_to_save": st.sampled_from([(), ("norm",)]),
    }
)


def base() -> nn.ModuleDict:
    torch.manual_seed(0)
    names = [str(i) for i in range(NUMBER)]
    return nn.ModuleDict({**{name: nn.Linear(4, 4 + int(name)) for name in names}, "norm": nn.LayerNorm(4)})


def trained(targets: set[str], **settings: Any) -> nn.ModuleDict:
    model = base()
    config = LoRAConfig(target_modules=sorted(targets), **settings)
    inject(model, config)
    initialize(model, cache=False)
    AdapterCheckpoint.attach(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    return model


def outputs(model: nn.ModuleDict) -> list[Tensor]:
    return [layer(torch.ones(2, 4)).detach() for layer in model.values()]


@few
@given(layers, options)
def test_what_is_loaded_computes_what_was_saved(targets: set[str], options: dict[str, Any]) -> None:
    model = trained(targets, **options)
    state = model.state_dict()
    assert not any("base_layer" in key for key in state)
    assert {key.split(".")[0] for key in state} - {"norm", KEY} == targets
    fresh = base()
    inject_as_in(fresh, state)
    fresh.load_state_dict(copy.deepcopy(state))
    assert lora_layers(fresh).keys() == targets
    assert all(layer.initialized for layer in lora_layers(fresh).values())
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh), outputs(model), strict=True))


@few
@given(layers, layers)
def test_a_checkpoint_fits_no_other_set_of_layers(one: set[str], other: set[str]) -> None:
    saved, model = trained(one, r=2), trained(other, r=2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    if one == other:
        model.load_state_dict(saved.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(saved), strict=True))
        return
    with pytest.raises(CheckpointError, match="on other layers"):
        model.load_state_dict(saved.state_dict())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_adapters_without_their_start_are_told_from_those_with_it() -> None:
    """Also where all factors are zero, as LoRA's are before they get their start."""
    model = base()
    config = LoRAConfig(r=2, target_modules=["0", "1"])
    inject(model, config)
    AdapterCheckpoint.attach(model, config)
    lora_layers(model)["0"].initialized = True
    state = model.state_dict()
    for found in (state, dict(state)):  # with torch's own notes beside it, and without
        fresh = base()
        inject_as_in(fresh, found)
        fresh.load_state_dict(copy.deepcopy(found))
        assert {name: layer.initialized for name, layer in lora_layers(fresh).items()} == {"0": True, "1": False}


def test_the_next_format_is_not_read() -> None:
    check_format({"format": 1})
    with pytest.raises(CheckpointError, match="newer version"):
        check_format({"format": 2})


def test_dropout_may_change_between_a_checkpoint_and_its_run_and_nothing_else() -> None:
    saved = trained({"0"}, r=2, lora_dropout=0.1)
    trained({"0"}, r=2, lora_dropout=0.3).load_state_dict(saved.state_dict())
    for other in ({"r": 3}, {"lora_alpha": 5.0}, {"init": "pissa"}):
        with pytest.raises(CheckpointError, match="The checkpoint's adapters have"):
            trained({"0"}, **{"r": 2, **other}).load_state_dict(saved.state_dict())


def test_a_base_without_weights_yet_is_described_when_it_has_them() -> None:
    config = LoRAConfig(r=2, target_modules=["0"])
    with torch.device("meta"):
        model = base()
    inject(model, config)
    AdapterCheckpoint.attach(model, config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    described = model.state_dict()[KEY]["base"]
    assert "0.weight" in described
    assert described == fingerprint(model)


def test_layers_that_an_older_version_left_out_are_named_to_be_excluded() -> None:
    def attention(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
        inject(model, config := LoRAConfig(r=2, **options))
        initialize(model, cache=False)
        AdapterCheckpoint.attach(model, config)
        return model

    state = attention(exclude_modules=["in_proj"]).state_dict()
    state[KEY]["config"]["exclude_modules"] = ()  # of a version that did not know this layer
    with pytest.raises(CheckpointError, match=r"name these layers in exclude_modules: \['0.in_proj'\]"):
        attention().load_state_dict(copy.deepcopy(state))
    attention(exclude_modules=["0.in_proj"]).load_state_dict(state)


def test_an_adapter_is_loaded_on_its_own_layer_and_on_none_with_a_longer_name() -> None:
    def make() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"proj": nn.Linear(4, 4), "block": nn.ModuleDict({"proj": nn.Linear(4, 4)})})

    model, config = make(), LoRAConfig(r=2, target_modules="proj")  # a regular expression
    inject(model, config)
    initialize(model, cache=False)
    AdapterCheckpoint.attach(model, config)
    with torch.no_grad():
        model["proj"].lora_B.add_(0.1)
    assert set(lora_layers(model)) == {"proj"}
    fresh, state = make(), model.state_dict()
    inject_as_in(fresh, state)
    assert set(lora_layers(fresh)) == {"proj"}
    fresh.load_state_dict(state)
    x = torch.ones(2, 4)
    assert torch.equal(fresh["proj"](x), model["proj"](x))
    assert not torch.equal(make()["proj"](x), model["proj"](x))


class Counting(nn.Linear):
    """A layer with state that is neither parameter nor buffer."""

    seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_extra_states_of_frozen_layers_are_kept_without_their_weights() -> None:
    def make() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"adapted": nn.Linear(4, 4), "frozen": Counting(4, 4)})

    model, config = make(), LoRAConfig(r=2, target_modules=["adapted"])
    inject(model, config)
    initialize(model, cache=False)
    AdapterCheckpoint.attach(model, config)
    model["frozen"].seen = 3
    state = model.state_dict()
    assert {key for key in state if key.startswith("frozen")} == {"frozen._extra_state"}
    fresh = make()
    inject_as_in(fresh, state)
    assert fresh["frozen"].seen == 0
    fresh.load_state_dict(state)
    assert fresh["frozen"].seen == 3
