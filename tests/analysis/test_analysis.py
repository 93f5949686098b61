"""The analysis of updates, on weights and updates whose truth is known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers.layers import adapted
from helpers.models import quiet_trainer, save_tiny_model
from helpers.modules import data, module
from helpers.planted_updates import IN, OUT, Planted, R, orthonormal
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from milora_lightning import MiLoRAInit, SubspaceMonitor
from milora_lightning.analysis.spectra import (
    analyze_matrix,
    analyze_model,
    block_number,
    update_of,
)
from milora_lightning.analysis.subspace import Update, similarity
from milora_lightning.analysis.tables import averages, by_type
from milora_lightning.cli.main import main
from milora_lightning.linalg.singular import SingularSlice


@pytest.mark.parametrize(("out", "in_features"), [(96, 64), (64, 96), (64, 64)])
def test_planted_subspaces_are_found(out: int, in_features: int) -> None:
    planted = Planted(out, in_features)
    bottom = planted.analyze(planted.U[:, -R:], planted.V[:, -R:])
    assert bottom.similarity["bottom"] == pytest.approx(1, abs=1e-5)
    assert bottom.similarity["top"] == pytest.approx(0, abs=1e-5)
    top = planted.analyze(planted.U[:, :R], planted.V[:, :R])
    assert top.similarity["top"] == pytest.approx(1, abs=1e-5)
    assert top.similarity["bottom"] == pytest.approx(0, abs=1e-5)
    assert top.similarity["expected"] == R / out
    half = planted.analyze(torch.cat([planted.U[:, :3], planted.U[:, -3:]], 1), planted.V[:, :R])
    assert half.similarity["top"] == pytest.approx(0.5, abs=1e-5)
    assert half.similarity["bottom"] == pytest.approx(0.5, abs=1e-5)


def test_random_subspaces_have_r_over_out() -> None:
    planted = Planted()
    found = [planted.analyze(orthonormal(OUT, R, 100 + i), orthonormal(IN, R, 200 + i)).similarity for i in range(40)]
    for part in ("top", "bottom", "random"):  # 40·R·R squared cosines, each 1/OUT on average: about 4 % of error
        assert sum(v[part] for v in found) / 40 == pytest.approx(R / OUT, rel=0.15)


def test_similarity_does_not_depend_on_the_basis() -> None:
    A, B = orthonormal(30, 4, 0), orthonormal(30, 7, 1)
    rotation = orthonormal(4, 4, 2)
    assert similarity(A @ rotation, B) == pytest.approx(similarity(A, B), rel=1e-12)
    assert similarity(A, torch.cat([A @ rotation, orthonormal(30, 1, 3)], 1)[:, :4]) == pytest.approx(1)


def test_amplification_and_norms_are_those_planted() -> None:
    planted = Planted()
    found = planted.analyze(planted.U[:, -R:], planted.V[:, -R:], gain=3.0)
    core = 3 * torch.linspace(1, 0.5, R, dtype=torch.float64)
    assert found.amplification == pytest.approx((core.norm() / planted.S[-R:].norm()).item(), rel=1e-4)
    assert found.relative_norm == pytest.approx((core.norm() / planted.S.norm()).item(), rel=1e-5)
    torch.testing.assert_close(found.delta_singular_values, core)
    torch.testing.assert_close(found.singular_values, planted.S, rtol=1e-4, atol=1e-7)


def test_energy_lies_where_it_was_planted() -> None:
    planted = Planted()
    found = planted.analyze(planted.U[:, 8:14], planted.V[:, 56:62])  # bins of 8 directions
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(found.left_energy[1], one, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.right_energy[7], one, rtol=1e-5, atol=0)
    spread = planted.analyze(orthonormal(OUT, R, 5), orthonormal(IN, R, 6))
    assert spread.right_energy.sum().item() == pytest.approx(1)
    delta = Update.of(orthonormal(OUT, R, 5), orthonormal(IN, R, 6).T)
    dense = delta.U * delta.S @ delta.Vh
    expected = (planted.U.T @ dense).square().sum(1).view(8, 8).sum(1) / dense.square().sum()
    left, _ = delta.energy(SingularSlice(planted.U, planted.S, planted.V.T), 8)
    torch.testing.assert_close(left, expected)
    assert left.sum() < 0.9  # the rest is in the null space of the longer side


@pytest.mark.parametrize("init", ["milora", "lora"])
def test_the_update_of_a_layer_is_what_it_adds_to_its_weight(init: str) -> None:
    """With its scale, which is not 1 where alpha is not r."""
    layer = adapted(init)
    assert layer.scaling == 1.5
    found = update_of(layer)
    torch.testing.assert_close((found.U * found.S @ found.Vh).float(), layer.delta_weight().detach())
    assert found.amplification(layer.base_layer.weight.detach(), 2) > 0


def test_subspaces_of_other_sizes_and_numbers_in_names() -> None:
    basis = orthonormal(12, 6, 0)
    assert similarity(basis[:, :2], basis) == pytest.approx(1)  # one holds the other
    assert similarity(basis, basis[:, 4:]) == pytest.approx(1)
    assert [block_number(name) for name in ("h.3.mlp", "3", "conv2d.4", "conv2d.proj", "layers.11.q.2")] == [
        3,
        3,
        4,
        0,
        11,
    ]


def test_rank_of_an_update_counts_what_is_not_zero() -> None:
    A, B = torch.randn(4, IN), torch.randn(OUT, 4)
    assert len(Update.of(B, A).S) == 4
    assert len(Update.of(torch.cat([B, B], 1), torch.cat([A, -A])).S) == 0  # products that cancel
    assert len(Update.of(torch.cat([B, B], 1), torch.cat([A, A])).S) == 4
    assert analyze_matrix("q", torch.randn(OUT, IN), Update.of(0 * B, A), R) is None


def test_analyze_command_writes_tables_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True)
    options = {"callbacks": [MiLoRAInit(r=4), saving], "enable_checkpointing": True}
    trainer = quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0, **options)
    lm = module(model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    trainer.fit(lm, data(tmp_path, model, num_generation_examples=0))
    path, output = str(tmp_path / "saved" / "last.ckpt"), tmp_path / "analysis"
    (tmp_path / "text.txt").write_text(" ".join(f"What is {i} plus {2 * i}?" for i in range(60)))
    more = ["--k", "6", "--intruder_top_k", "5", "--intruder_threshold", "0.9", "--text", str(tmp_path / "text.txt")]
    main(["analyze", "--ckpt_path", path, "--output", str(output), *more, "--text_tokens", "512"])

    printed = capsys.readouterr().out
    assert "q_proj" in printed
    assert {p.name for p in output.iterdir()} == {
        "analysis.json",
        *("similarity.csv", "spectra.csv", "energy.csv", "similarity.png", "spectra.png", "sizes.png", "energy.png"),
    }
    rows = list(csv.DictReader((output / "similarity.csv").open()))
    written = json.loads((output / "analysis.json").read_text())
    assert len(rows) == 14
    assert {row["block"] for row in rows} == {"0", "1"}
    for row in rows:
        layer = lm.get_submodule(row["layer"])
        assert row["module"] == row["layer"].split(".")[-1]
        U, S, Vh = torch.linalg.svd(layer.delta_weight().detach().double())
        W = layer.base_layer.weight.detach().double()
        left = torch.linalg.svd(W, full_matrices=False).U
        assert float(row["bottom"]) == pytest.approx(similarity(U[:, :4], left[:, -4:]), rel=1e-3)
        assert float(row["top"]) == pytest.approx(similarity(U[:, :4], left[:, :4]), rel=1e-3)
        inside = U[:, :4].T @ W @ Vh[:4].T
        assert float(row["amplification"]) == pytest.approx((S[:4].norm() / inside.norm()).item(), rel=1e-3)
        assert float(row["relative_norm"]) == pytest.approx((S.norm() / W.norm()).item(), rel=1e-3)
        assert 0 < float(row["update_effect"]) < 10
        assert float(written["matrices"][row["layer"]]["interference"]) == pytest.approx(
            float(row["interference"]), rel=1e-5
        )
        k, right = int(row["k"]), torch.linalg.svd(W, full_matrices=False).Vh
        inside = left[:, :k].T @ layer.delta_weight().double() @ right[:k].T
        assert float(row["interference"]) == pytest.approx((inside.norm() / S.norm()).square().item(), rel=1e-3)
        cosines = (left.T @ torch.linalg.svd(W + layer.delta_weight().double()).U[:, :5]).abs().amax(0)
        assert int(row["intruders"]) == (cosines < 0.9).sum()
    assert {row["k"] for row in rows} == {"6"}
    assert sum(int(row["intruders"]) for row in rows) > 0
    assert written["mean"]["intruders"] == pytest.approx(sum(int(row["intruders"]) for row in rows) / 14)
    for name in ("similarity", "spectra", "sizes", "energy"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="something at"):
        main(["analyze", "--ckpt_path", path, "--output", str(output)])
    with pytest.raises(SystemExit, match=r"no checkpoint 'absent.ckpt'"):
        main(["analyze", "--ckpt_path", "absent.ckpt", "--output", str(tmp_path / "other")])


def test_what_was_not_trained_is_not_analyzed(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=0, callbacks=[MiLoRAInit(r=4)])
    lm = module(model)
    trainer.fit(lm, data(tmp_path, model))
    trainer.save_checkpoint(tmp_path / "untrained.ckpt")
    with pytest.raises(SystemExit, match="no update to analyze"):
        main(["analyze", "--ckpt_path", str(tmp_path / "untrained.ckpt"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_monitor_logs_what_the_analysis_finds(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    monitor = SubspaceMonitor(every_n_steps=5, intruders=True)
    callbacks = [MiLoRAInit(r=4), monitor]
    trainer = quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0, callbacks=callbacks)
    lm = module(model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    trainer.fit(lm, data(tmp_path, model, num_generation_examples=0))
    logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("subspace/")}
    for name, group in by_type(analyze_model(lm)).items():
        for part in ("top", "bottom", "random", "amplification", "interference", "intruders"):
            assert logged.pop(f"subspace/{name}/{part}") == pytest.approx(averages(group)[part], rel=1e-3)
    assert not logged
    with pytest.raises(ValueError, match="every_n_steps"):
        SubspaceMonitor(0)


def test_a_measurement_is_logged_under_its_own_step_and_once(tmp_path: Path) -> None:
    """Whatever the steps are at which Lightning logs, which would repeat it until the next one."""
    model = save_tiny_model(tmp_path / "llama", "llama")
    logger = CSVLogger(tmp_path / "logs", flush_logs_every_n_steps=1)
    options = {"max_steps": 8, "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 2}
    callbacks = [MiLoRAInit(r=4), SubspaceMonitor(every_n_steps=3)]
    trainer = quiet_trainer(tmp_path, logger=logger, callbacks=callbacks, **options)
    trainer.fit(module(model), data(tmp_path, model, num_generation_examples=0))
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    measured = [int(row["step"]) for row in rows if row["subspace/q_proj/top"]]
    assert measured == [2, 5]  # Lightning counts from 0
