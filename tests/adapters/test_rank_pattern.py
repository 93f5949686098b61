"""Different ranks and scales for different layers: in training, checkpoints and exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import train
from helpers.models import quiet_trainer, save_tiny_model, tiny_model
from helpers.modules import data, module

from milora_lightning import CheckpointError, LoRAConfig, MiLoRAInit, initialize, inject, load_adapter, lora_layers
from milora_lightning.adapters.parts import TargetNotFoundError

PATTERNS = {"rank_pattern": {"q_proj": 6, r"layers\.1\..*": 2}, "alpha_pattern": {"down_proj": 8}}


def expected(name: str) -> tuple[int, float]:
    rank = 6 if name.endswith("q_proj") else 2 if ".1." in name else 4
    return rank, 8 / rank if name.endswith("down_proj") else 1.0


def test_each_layer_starts_from_its_own_slice() -> None:
    model = tiny_model()
    inject(model, LoRAConfig(r=4, **PATTERNS))
    initialize(model)
    for name, layer in lora_layers(model).items():
        rank, scaling = expected(name)
        assert (layer.r, layer.scaling) == (rank, scaling)
        smallest = torch.linalg.svdvals(layer.base_layer.weight.detach().double())[-rank:]
        product = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        torch.testing.assert_close(torch.linalg.svdvals(product)[:rank], smallest, rtol=1e-4, atol=1e-6)
    inject(model, LoRAConfig(r=4, **PATTERNS))  # twice is once
    with pytest.raises(ValueError, match=r"r=6 already, and r=4 is asked for"):
        inject(model, LoRAConfig(r=4))


def test_lora_alpha_of_a_layer() -> None:
    config = LoRAConfig(r=4, lora_alpha=8, rank_pattern={"a": 2}, alpha_pattern={"b": 1})
    assert [(config.rank(n), config.alpha(n), config.scale(n)) for n in ("x.a", "x.b", "x.c", "x.ca")] == [
        (2, 8, 4),
        (4, 1, 0.25),
        (4, 8, 2),
        (4, 8, 2),
    ]
    twice = MiLoRAInit(r=4, lora_alpha="2r", rank_pattern={"a": 2}).config
    assert twice is not None
    assert (twice.scale("a"), twice.scale("b")) == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be a whole number"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern must be a whole number"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern must be positive"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def test_a_key_that_matches_nothing_is_refused() -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(TargetNotFoundError, match=f"'proj' of {option} matches"):
            inject(tiny_model(), LoRAConfig(r=4, **{option: {"proj": 2}}))


def test_checkpoints_hold_the_patterns(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base", "llama")
    first = module(folder)
    path = train(tmp_path, first, data(tmp_path, folder), **PATTERNS)
    again = module(folder)
    again.configure_model()
    load_adapter(again, path)
    for name, layer in lora_layers(again).items():
        assert (layer.r, layer.scaling) == expected(name)
        assert torch.equal(layer.delta_weight(), lora_layers(first)[name].delta_weight())
    quiet_trainer(tmp_path, max_steps=5, callbacks=[MiLoRAInit(r=4, **PATTERNS)]).fit(
        module(folder), data(tmp_path, folder), ckpt_path=path
    )
    other = quiet_trainer(tmp_path, max_steps=5, callbacks=[MiLoRAInit(r=4, rank_pattern={"q_proj": 6})])
    with pytest.raises(
        CheckpointError, match=r"r=2\.0, this run's have .* as on 'model\.model\.layers\.0\.mlp\.down_proj"
    ):
        other.fit(module(folder), data(tmp_path, folder), ckpt_path=path)
