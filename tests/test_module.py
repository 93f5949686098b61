"""CausalLMModule with SFTDataModule through a Trainer, on tiny models saved to a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import TINY_CONFIGS, quiet_trainer, save_tiny_model
from helpers.modules import data, module
from lightning.pytorch import Callback, LightningModule, Trainer

from milora_lightning import CausalLMModule, EvaluationSummary, MiLoRAInit, PredictionWriter, SFTDataModule, lora_layers
from milora_lightning.models.pretrained import load_causal_lm


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "llama", "llama")


def batch_of(datamodule: SFTDataModule) -> dict[str, Any]:
    datamodule.setup("fit")
    return next(iter(datamodule.train_dataloader()))


@pytest.mark.parametrize("kind", list(TINY_CONFIGS))
def test_loss_is_that_of_the_whole_logits_at_supervised_positions(kind: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / kind, kind)
    lm = module(model)
    lm.configure_model()
    batch = batch_of(data(tmp_path, model))
    logits = lm.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    total, tokens = lm.loss(batch)
    assert tokens == (batch["labels"][:, 1:] != -100).sum() < batch["attention_mask"].sum()
    assert lm(batch).shape == (tokens, 128)
    torch.testing.assert_close(total / tokens, expected)


def test_a_batch_in_which_nothing_is_learned_adds_nothing_to_a_start_from_data(llama: Path) -> None:
    lm = module(llama)
    lm.configure_model()
    ids = torch.arange(5, 17).view(2, 6)
    assert lm.start_loss({"input_ids": ids, "labels": torch.full_like(ids, -100)}) == 0
    total, tokens = lm.loss({"input_ids": ids, "labels": ids})
    torch.testing.assert_close(lm.start_loss({"input_ids": ids, "labels": ids}), total / tokens)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(TINY_CONFIGS))
def test_training_lowers_the_loss(kind: str, gradient_checkpointing: bool, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / kind, kind)
    lm = module(
        model,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
    )
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())
            assert pl_module.model.training

    trainer = quiet_trainer(tmp_path, max_steps=20, max_epochs=9, callbacks=[MiLoRAInit(r=8), Losses()])
    trainer.fit(lm, data(tmp_path, model, num_generation_examples=0))
    assert all(map(math.isfinite, losses))
    assert sum(losses[-4:]) < sum(losses[:4])


def test_schedule_rises_linearly_and_falls_to_zero(llama: Path, tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[MiLoRAInit(r=4), Rates()])
    trainer.fit(module(llama, warmup_steps=4), data(tmp_path, llama))
    assert rates == pytest.approx([3e-4 * min(i / 4, (10 - i) / 6) for i in range(10)])
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0


def test_evaluation_weights_by_tokens_and_leaves_training_undisturbed(llama: Path, tmp_path: Path) -> None:
    """Batches of unequal size give the loss over all tokens; training goes the same way with evaluations or without."""

    def train(**options: Any) -> tuple[CausalLMModule, Trainer]:
        torch.manual_seed(0)
        lm = module(llama)
        callbacks = [MiLoRAInit(r=4, lora_dropout=0.2)]
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks, **options)
        trainer.fit(lm, data(tmp_path, llama, eval_batch_size=3))
        return lm, trainer

    plain, _ = train(limit_val_batches=0)
    lm, trainer = train(val_check_interval=3)
    for a, b in zip(plain.parameters(), lm.parameters(), strict=True):
        assert torch.equal(a, b)
    assert lm.model.training
    datamodule = data(tmp_path, llama, eval_batch_size=3)
    losses, answers = trainer.validate(lm, datamodule, verbose=False)
    results = losses | answers
    with torch.no_grad():
        datamodule.setup("validate")
        batches = [lm.eval().loss(batch) for batch in datamodule.val_dataloader()[0]]
        whole = sum(total for total, _ in batches) / sum(tokens for _, tokens in batches)
    assert len({int(tokens) for _, tokens in batches}) > 1
    assert results["val_loss"] == pytest.approx(whole.item(), rel=1e-5)
    assert results["val_perplexity"] == pytest.approx(whole.exp().item(), rel=1e-5)
    assert 0 <= results["val_accuracy"] <= 1
    metrics = trainer.callback_metrics
    assert {"val_loss", "val_perplexity", "val_accuracy"} <= metrics.keys()


def test_training_metrics_are_logged(llama: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[MiLoRAInit(r=4)])
    trainer.fit(module(llama), data(tmp_path, llama))
    logged = trainer.callback_metrics
    assert logged["grad_norm"] > 0
    assert logged["tokens_per_second"] > 0
    assert logged["train_loss"] > 0
    assert logged["lr"] > 0


def test_generation_continues_a_left_padded_prompt_as_if_alone(llama: Path, tmp_path: Path) -> None:
    lm = module(llama, max_new_tokens=6)
    lm.configure_model()
    datamodule = data(tmp_path, llama, pad_to_multiple_of=1)
    datamodule.setup("test")
    batch = next(iter(datamodule.test_dataloader()[1]))
    together = lm.eval().generate(batch)
    alone = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[mask.bool()].unsqueeze(0)
        alone += lm.generate({"input_ids": row, "attention_mask": torch.ones_like(row)})
    assert len({int(m.sum()) for m in batch["attention_mask"]}) > 1
    assert together == alone


def test_predict_writes_prompt_generation_and_reference(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "predictions.jsonl"
    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4), PredictionWriter(str(output))])
    lm = module(llama)
    for _ in range(2):  # the second time replaces the file
        trainer.predict(lm, data(tmp_path, llama, generation_batch_size=4))
    records = [json.loads(line) for line in output.read_text().splitlines()]
    sources = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert len(records) == len(sources) == 11
    for record, source in zip(records, sources, strict=True):
        assert record.keys() == {"prompt", "instruction", "generation", "reference", "task"}
        assert source["instruction"] == record["instruction"] in record["prompt"]
        assert record["reference"] == source["output"]


def test_summary_prints_before_and_after(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [MiLoRAInit(r=8), EvaluationSummary()]
    trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=-1, callbacks=callbacks)
    lm = module(llama, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    trainer.fit(lm, data(tmp_path, llama))
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    table = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows if len(cells) == 3}
    assert {"loss", "perplexity", "accuracy"} <= table.keys()
    before, after = map(float, table["loss"])
    assert before == pytest.approx(math.log(128), abs=0.5)  # an untrained model knows nothing
    assert after < before
    assert after == pytest.approx(trainer.callback_metrics["val_loss"].item(), rel=1e-3)


def test_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model 'nobody/nothing'.*Check the name"):
        module(Path("nobody/nothing")).configure_model()
    with pytest.raises(FileNotFoundError, match=r"no GGUF file .*missing\.gguf"):
        module(tmp_path / "missing.gguf").configure_model()
    with pytest.raises(RuntimeError, match=r"configure_model\(\)"):
        module(tmp_path)({"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)})


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_one_optimizer_step_is_that_of_plain_pytorch(
    optimizer: type[torch.optim.Optimizer], llama: Path, tmp_path: Path
) -> None:
    """The reference writes W + BA − B₀A₀ out as a weight, and takes the mean over whole logits."""
    batches: list[dict[str, torch.Tensor]] = []

    class Batches(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
            batches.append(batch)

    lm = module(llama, warmup_steps=0, optimizer=lambda params: optimizer(params, lr=1.0))
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=4), Batches()])
    trainer.fit(lm, data(tmp_path, llama, num_generation_examples=0))
    trained = lora_layers(lm.model)
    assert len(trained) == 14

    plain = load_causal_lm(str(llama)).double().requires_grad_(False)
    factors = {
        name: [x.detach().double().requires_grad_() for x in (layer.initial_A, layer.initial_B)]
        for name, layer in trained.items()
    }
    initial = {name: (B @ A).detach() for name, (A, B) in factors.items()}
    weights = {f"{n}.weight": plain.get_parameter(f"{n}.weight") + B @ A - initial[n] for n, (A, B) in factors.items()}
    (batch,) = batches
    logits = torch.func.functional_call(plain, weights, (batch["input_ids"], batch["attention_mask"])).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    optimizer([x for pair in factors.values() for x in pair], lr=1.0).step()  # type: ignore[call-arg]
    for name, layer in trained.items():
        for got, want, start in zip(
            (layer.lora_A, layer.lora_B), factors[name], (layer.initial_A, layer.initial_B), strict=True
        ):
            moved = want.detach() - start
            assert (got - start - moved).norm() <= 1e-3 * moved.norm()
