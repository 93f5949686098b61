"""Ranks that are chosen by energy, for the same total as equal ones."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.fused import PARTS, phi3
from helpers.models import save_tiny_model, write_examples
from torch import nn

from milora_lightning import LoRAConfig, inject, lora_layers
from milora_lightning.analysis.ranks import MOST, rank_pattern, ranks_by_share, shares
from milora_lightning.cli.commands.ranks import RanksCLI
from milora_lightning.cli.main import command_line, main


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_shares_are_those_of_the_spectrum(shape: tuple[int, int]) -> None:
    W = torch.randn(shape)
    S = torch.linalg.svdvals(W.double()).square()
    torch.testing.assert_close(shares(W, "principal"), S.cumsum(0) / S.sum())
    torch.testing.assert_close(shares(W, "minor"), S.flip(0).cumsum(0) / S.sum())
    assert shares(torch.zeros(shape), "minor").tolist() == [1.0] * 12
    both = torch.stack([W, torch.randn(shape)])
    torch.testing.assert_close(shares(both, "minor"), (shares(both[0], "minor") + shares(both[1], "minor")) / 2)


def test_no_other_ranks_of_that_total_have_a_smaller_largest_share() -> None:
    layers = {name: shares(torch.randn(6, 6) @ torch.diag(torch.rand(6) ** k), "minor") for k, name in enumerate("abc")}
    r, most = 2, 5
    found = ranks_by_share(layers, r, most)
    assert sum(found.values()) == r * len(layers)

    def largest(ranks: tuple[int, ...]) -> float:  # a rank of 1 has no choice
        return max([s[n - 1].item() for s, n in zip(layers.values(), ranks, strict=True) if n > 1], default=0.0)

    possible = [n for n in itertools.product(range(1, most + 1), repeat=3) if sum(n) == r * 3]
    assert largest(tuple(found.values())) == min(map(largest, possible))


def test_ranks_keep_to_their_bounds() -> None:
    layers = {
        "zeros": torch.linspace(0, 1e-9, 100).double(),
        "small": torch.tensor([0.5, 1.0]),
        "other": torch.rand(50).cumsum(0),
    }
    found = ranks_by_share(layers, 8)
    assert found["zeros"] <= MOST * 8
    assert found["small"] <= 2
    assert sum(found.values()) <= 8 * 3
    assert ranks_by_share(layers, 1) == dict.fromkeys(layers, 1)


def test_the_pattern_gives_each_layer_its_rank() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(12)))
    for k, layer in enumerate(net):
        layer.weight.data.copy_(torch.randn(24, 24) @ torch.diag(torch.linspace(1, 0.5, 24) ** k))
    net.requires_grad_(True)
    inject(net, LoRAConfig(r=4, init="lora"))
    pattern = rank_pattern(net, 4)
    assert sum(pattern.values()) == 48
    config = LoRAConfig(r=4, rank_pattern=pattern)
    ranks = [config.rank(str(k)) for k in range(12)]
    assert ranks == list(pattern.values())  # '1' is not '11'
    assert ranks == sorted(ranks)  # the steeper, the more directions hold little


def test_layers_of_fused_parts_keep_their_rank_and_the_others_share_what_they_have() -> None:
    def ranks(**options: Any) -> dict[str, int]:
        model = phi3()
        inject(model, LoRAConfig(r=3, **options))
        suggested.append(rank_pattern(model, 3))
        return {name: layer.r for name, layer in lora_layers(model).items()}

    suggested: list[dict[str, int]] = []
    equal = ranks(fused_parts=PARTS)
    fused = {name for name in equal if name.endswith(tuple(PARTS))}
    assert len(fused) == 4
    assert {name.replace("\\", "") for name in suggested[0]} == equal.keys() - fused
    assert sum(suggested[0].values()) == 3 * len(suggested[0])
    chosen = ranks(fused_parts=PARTS, rank_pattern=suggested[0])
    assert {name for name in equal if chosen[name] != equal[name]}.isdisjoint(fused)
    ranks()
    assert len(suggested[-1]) == len(equal)  # without parts, all layers are chosen for


def test_the_command_writes_an_overlay_that_fit_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model", "llama")
    write_examples(tmp_path / "train.jsonl", 4)
    fit = ["--model.name_or_path=model", "--data.source.train=train.jsonl", "--adapter.r=4", "--adapter.lora_alpha=8"]
    fit += ["--trainer.accelerator=cpu", "--logger=none", "--adapter.alpha_pattern={down_proj: 4}"]
    main(["ranks", *fit, "--output", "ranks.yaml"])
    pattern = yaml.safe_load((tmp_path / "ranks.yaml").read_text())["adapter"]["rank_pattern"]
    assert sum(pattern.values()) == 4 * len(pattern) == 4 * 14
    assert len(set(pattern.values())) > 1
    cli = command_line(RanksCLI, ["fit", *fit, "--config", "ranks.yaml"])
    model = cli.model.load_model()
    inject(model, cli.config_init["fit"]["adapter"].config)
    layers = lora_layers(model)
    assert [layer.r for layer in layers.values()] == list(pattern.values())
    assert {(name.endswith("down_proj"), layer.scaling) for name, layer in layers.items()} == {
        (True, 1.0),
        (False, 2.0),
    }
    for options, said in ((["--config", "ranks.yaml", "--output", "o.yaml"], "gives ranks already"),):
        with pytest.raises(SystemExit, match=said):
            main(["ranks", *fit, *options])
    with pytest.raises(SystemExit, match="already"):
        main(["ranks", *fit, "--output", "ranks.yaml"])
