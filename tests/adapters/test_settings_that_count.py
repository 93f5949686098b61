"""Each setting of an adapter counts: seeds, names, modes, what is compared, and what is put back afterwards."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.callback_modules import Regression
from helpers.models import quiet_trainer
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from milora_lightning import LoRAConfig, MiLoRAInit, adapters_disabled, adapters_merged, initialize, inject, lora_layers
from milora_lightning.adapters import factor_cache
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.adapters.parts import TargetNotFoundError
from milora_lightning.adapters.targets import find_targets


def alike(number: int = 3, size: int = 12) -> nn.Sequential:
    """Layers of equal shapes and equal weights."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(number)))
    for layer in model[1:]:
        layer.load_state_dict(model[0].state_dict())
    return model


def starts(seed: int, init: str) -> list[Tensor]:
    model = alike()
    inject(model, LoRAConfig(r=3, init=init))
    initialize(model, seed)
    return [layer.lora_A.detach() for layer in lora_layers(model).values()]


@pytest.mark.parametrize("init", ["lora", "random"])
def test_layers_of_equal_shapes_and_weights_start_differently(init: str) -> None:
    one, two, three = starts(1, init)
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)
    assert not torch.equal(one, three)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_callbacks_seed_is_what_random_starts_derive_from(seed: int, tmp_path: Path) -> None:
    """Zero, too, whatever the run's own seed is."""

    def start(runs_seed: int, **options: Any) -> list[Tensor]:
        module = Regression()
        module.setup("fit")
        torch.manual_seed(runs_seed)
        callback = MiLoRAInit(r=4, init="lora", target_modules=["0", "3"], **options)
        trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[callback])
        trainer.fit(module)
        fresh = Regression()
        fresh.setup("fit")
        inject(fresh, LoRAConfig(r=4, init="lora", target_modules=["0", "3"]))
        initialize(fresh, options.get("seed", runs_seed))
        expected = [layer.lora_A.detach() for layer in lora_layers(fresh).values()]
        # B starts at zero, so the first step leaves A alone.
        found = [layer.lora_A.detach() for layer in lora_layers(module).values()]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        return found

    one, other = start(11, seed=seed), start(12, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(start(11), start(12), strict=True))


@pytest.mark.parametrize(
    "other",
    [{"r": 2}, {"lora_alpha": 5}, {"lora_dropout": 0.1}, {"dropout_on": "product"}, {"init": "pissa"}],
    ids=lambda other: next(iter(other)),
)
def test_a_second_injection_compares_every_setting(other: dict[str, Any]) -> None:
    model = alike()
    inject(model, LoRAConfig(r=3, target_modules=["0"]))
    with pytest.raises(ValueError, match=next(iter(other))):
        inject(model, LoRAConfig(**{"r": 3, **other}))
    assert list(lora_layers(model)) == ["0"]  # nothing is changed


def test_adapters_take_over_the_mode_of_their_layers() -> None:
    model = alike().train()
    model[1].eval()
    inject(model, LoRAConfig(r=3))
    assert [layer.training for layer in model] == [True, False, True]
    assert [layer.base_layer.training for layer in model] == [True, False, True]


def trained() -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A model with updates; an input; what the base computes, and what the model does."""
    model, x = alike(), torch.randn(5, 12)
    before = model(x)
    inject(model, LoRAConfig(r=3, lora_alpha=5))
    initialize(model)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(0.1)
        return model, x, before, model(x)


def test_contexts_within_themselves_end_with_the_outermost() -> None:
    model, x, before, after = trained()
    with adapters_disabled(model):
        with adapters_disabled(model):
            assert torch.equal(model(x), before)
        with pytest.raises(ZeroDivisionError), adapters_disabled(model):
            raise ZeroDivisionError
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), after)
    with adapters_merged(model):
        with adapters_merged(model):
            pass
        assert all(layer.merged for layer in lora_layers(model).values())
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_what_was_switched_off_stays_off() -> None:
    model, *_ = trained()
    model[1].enabled = False
    with adapters_disabled(model):
        assert not any(layer.enabled for layer in model)
    assert [layer.enabled for layer in model] == [True, False, True]


def test_the_weight_that_others_read_is_that_of_what_is_computed() -> None:
    model, x, *_ = trained()
    for layer in model:
        torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
        layer.enabled = False
        assert torch.equal(layer.weight, layer.base_layer.weight)


def test_threads_that_start_later_have_as_many_threads_as_before() -> None:
    """Torch hands the number that was set last on to new threads, such as those of data loaders."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        model = alike()
        inject(model, LoRAConfig(r=3))
        initialize(model, cache=False)
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_names_match_after_a_dot_only() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "out": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    assert list(find_targets(model, ["proj"])) == ["out.proj"]
    del model["out"]
    with pytest.raises(TargetNotFoundError, match="'proj' matches no linear layer"):
        find_targets(model, ["proj"])


def test_excluded_are_modules_with_all_that_is_inside_and_no_others() -> None:
    block = {"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}
    model = nn.ModuleDict({"mlp": nn.ModuleDict(block), "mlp2": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    for excluded in (["mlp"], "mlp"):
        assert set(find_targets(model, "all-linear", excluded)) == {"mlp2", "head"}
    with pytest.raises(TargetNotFoundError, match=r"'lp'.*no such module"):
        find_targets(model, "all-linear", ["lp"])


def test_an_output_head_is_left_out_whatever_its_name_is() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=8, max_position_embeddings=8))
    assert model.get_output_embeddings() is model.cls.predictions.decoder
    found = find_targets(nn.ModuleDict({"lm": model}), "all-linear")
    assert "lm.cls.predictions.transform.dense" in found
    assert "lm.cls.predictions.decoder" not in found
    assert "decoder" in find_targets(nn.ModuleDict({"decoder": nn.Linear(4, 4)}), "all-linear")  # no language model's


def test_only_the_part_that_is_adapted_is_frozen() -> None:
    model = nn.ModuleDict({"student": alike(2), "critic": nn.Linear(4, 4)})
    inject(model, LoRAConfig(r=3, module="student"))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {f"student.{layer}.{factor}" for layer in "01" for factor in ("lora_A", "lora_B")}
    assert trains == factors | {"critic.weight", "critic.bias"}


@pytest.mark.parametrize("init", ["milora", "pissa", "middle", "random"])
@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_the_initial_product_times_the_scale_is_a_part_of_the_weight(init: str, scaling: float) -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    A, B = initial_factors(weight, 3, scaling, init, torch.Generator().manual_seed(1))
    part, rest = scaling * B @ A, weight - scaling * B @ A
    # The singular values of a part and the rest are together those of the whole.
    together = torch.cat([torch.linalg.svdvals(part)[:3], torch.linalg.svdvals(rest)[:9]])
    torch.testing.assert_close(together.sort().values, torch.linalg.svdvals(weight).sort().values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # shared out evenly


def test_loras_start_is_within_its_bound_of_the_number_of_inputs() -> None:
    A, B = initial_factors(torch.ones(7, 400), 8, init="lora", generator=torch.Generator().manual_seed(0))
    assert not B.any()
    assert 0.9 / math.sqrt(400) < A.abs().max() <= 1 / math.sqrt(400)
    assert abs(A.mean()) < 0.1 / math.sqrt(400)


def test_cached_starts_differ_wherever_computed_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    monkeypatch.setattr(factor_cache, "_SMALLEST", 1)
    one, other = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))
    cases = [
        (weight, r, scaling, init, seed)
        for weight in (one, other, one.T)
        for r, scaling, init, seed in (
            *((2, 1.0, init, 0) for init in ("milora", "pissa", "middle", "random", "lora")),
            (3, 1.0, "milora", 0),
            (2, 2.0, "milora", 0),
            (2, 1.0, "random", 3),
        )
    ]
    for _ in range(2):  # computed, and read
        for weight, r, scaling, init, seed in cases:
            generators = (torch.Generator().manual_seed(seed) for _ in range(2))
            found, expected = (
                compute(weight, r, scaling, init, generator)
                for compute, generator in zip((factor_cache.cached_factors, initial_factors), generators, strict=True)
            )
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(cases) - 2 * 3  # neither scales nor LoRA need one


def test_twice_the_rank_is_each_layers_own_unless_it_has_an_alpha() -> None:
    ranks, alphas = {"a": 4, "b": 2}, {"a": 3.0}
    config = MiLoRAInit(r=8, lora_alpha="2r", rank_pattern=ranks, alpha_pattern=alphas).config
    assert [config.scale(name) for name in ("x.a", "x.b", "x.c")] == [3 / 4, 2, 2]
    assert (ranks, alphas) == ({"a": 4, "b": 2}, {"a": 3.0})  # what was given is not changed
    plain = MiLoRAInit(r=8, rank_pattern=ranks).config
    assert [plain.scale(name) for name in ("x.a", "x.b", "x.c")] == [1, 1, 1]
