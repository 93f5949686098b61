"""What fine-tuning makes a model forget, against the definition in float64."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.callback_modules import LanguageModel, Regression, adapted_language_model
from helpers.data_fixtures import make_tokenizer
from helpers.distributed_runs import FSDP1OnCPU
from helpers.models import quiet_trainer, save_tiny_model, tiny_model, tiny_tokenizer
from helpers.modules import data, module
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import T5Config, T5ForConditionalGeneration

from milora_lightning import CausalLMModule, ForgettingMonitor, LoRAConfig, MiLoRAInit, initialize, inject, lora_layers
from milora_lightning.data.held_out import pack, read_texts
from milora_lightning.metrics import Forgetting, forgetting


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(" ".join(f"What is {i} plus {2 * i}?" for i in range(60)))
    return tmp_path / "text.txt"


def test_metric_is_the_definition_over_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "CPU_LOGITS", 7 * 31)  # several chunks, the last one smaller
    torch.manual_seed(0)
    tuned, base = torch.randn(3, 200, 31), torch.randn(3, 200, 31)
    p, q = base.double().softmax(-1), tuned.double().softmax(-1)
    metric = Forgetting()
    metric.update(tuned[:1], base[:1])  # batches of different sizes count by their tokens
    metric.update(tuned[1:], base[1:])
    results = metric.compute()
    assert results["kl"].item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert results["cross_entropy"].item() == pytest.approx(-(p * q.log()).sum(-1).mean().item(), rel=1e-5)
    close = Forgetting()
    close.update(base + 1e-4 * tuned, base)  # far below the rounding of the definition's terms
    q = (base + 1e-4 * tuned).double().softmax(-1)
    assert close.compute()["kl"].item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=0.01)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(2, 4\)"):
        metric.update(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metric_of_equal_logits(dtype: torch.dtype) -> None:
    logits = 10 * torch.randn(4, 100, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[..., 7] = -torch.inf  # a token that the model cannot say
    metric = Forgetting()
    metric.update(logits, logits)
    p = logits.double().softmax(-1)
    entropy = -torch.xlogy(p, p).sum(-1).mean().item()
    assert metric.compute()["kl"].item() == 0
    assert metric.compute()["cross_entropy"].item() == pytest.approx(entropy, rel=1e-5)


def test_text_is_packed_into_blocks(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("1 plus 2", " ", "3 4")))
    texts = read_texts(str(tmp_path / "text.jsonl"))
    assert texts == ["1 plus 2", "3 4"]
    ids = [*tokenizer("1 plus 2")["input_ids"], tokenizer.eos_token_id, *tokenizer("3 4")["input_ids"]]
    assert pack(texts, tokenizer, 2, 100).flatten().tolist() == ids[: len(ids) // 2 * 2]
    assert pack(texts, tokenizer, 2, 5).shape == (2, 2)
    with pytest.raises(ValueError, match="do not fill one block of 64"):
        pack(texts, tokenizer, 64, 100)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        read_texts(str(tmp_path / "absent.txt"))
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "1"}))
    with pytest.raises(ValueError, match=r"no field 'text'.*body"):
        read_texts(str(tmp_path / "other.jsonl"))


def test_blocks_begin_as_the_tokenizer_begins_a_text() -> None:
    """With BOS, if it adds one; between them no token is lost, and texts are kept apart."""
    texts = ["Below is an instruction.", "Write a response."]
    for begins in (True, False):
        tokenizer = make_tokenizer(adds_specials=begins)
        blocks = pack(texts, tokenizer, 4, 1000)
        bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        joined = [*bare[0], tokenizer.eos_token_id, *bare[1]]
        assert set(blocks[:, 0].tolist()) == {tokenizer.bos_token_id} or not begins
        inside = blocks[:, begins:].flatten().tolist()
        assert inside == joined[: len(inside)]
        assert len(joined) - len(inside) < 4 - begins
        assert pack(texts, tokenizer, 4, 11).shape == (2, 4)


def test_the_start_is_logged_where_a_run_begins_and_not_where_it_goes_on(text: Path) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append((values, step)))
    monitor = ForgettingMonitor(str(text))
    monitor._before = {"forgetting_kl": 0.0}
    for step in (7, 0):
        monitor.on_train_start(SimpleNamespace(global_step=step, loggers=[logger]), None)  # type: ignore[arg-type]
    assert logged == [({"forgetting_kl": 0.0}, 0)]


def test_dropout_is_off_while_it_is_measured_and_on_afterwards(text: Path, tmp_path: Path) -> None:
    lm = LanguageModel()
    lm.configure_model()
    lm.tokenizer = tiny_tokenizer()
    inject(lm, LoRAConfig(r=2, lora_dropout=0.5))
    initialize(lm)
    lm.lm.train()
    lm.lm.transformer.h[0].eval()
    modes = [module.training for module in lm.modules()]
    monitor, trainer = ForgettingMonitor(str(text), block_length=16, max_tokens=64), quiet_trainer(tmp_path)
    monitor.setup(trainer, lm, "validate")
    assert monitor.measure(trainer, lm)["forgetting_kl"] == 0  # GPT-2 has dropout of its own as well
    assert [module.training for module in lm.modules()] == modes
    with torch.no_grad():
        for layer in lora_layers(lm).values():
            layer.lora_B.add_(0.1)
    changed = monitor.measure(trainer, lm)
    assert changed["forgetting_kl"] > 1e-5
    assert monitor.measure(trainer, lm) == changed


def test_several_texts_count_alike_and_each_is_told(text: Path, tmp_path: Path) -> None:
    lm = adapted_language_model(moved=True)
    (tmp_path / "other.txt").write_text("Below is an instruction. " * 2)
    trainer = quiet_trainer(tmp_path)
    places = {"sums": str(text), "other": str(tmp_path / "other.txt")}
    options = {"block_length": 16, "max_tokens": 96, "batch_size": 2}
    alone = {}
    for name, place in places.items():
        monitor = ForgettingMonitor(place, **options)
        monitor.setup(trainer, lm, "validate")
        alone[name] = monitor.measure(trainer, lm)["forgetting_kl"]
        assert monitor.examples["forgetting_kl"].mean().item() == pytest.approx(alone[name], rel=1e-5)
    both = ForgettingMonitor(places, **options)
    both.setup(trainer, lm, "validate")
    found = both.measure(trainer, lm)
    assert {name: found[f"forgetting_kl/{name}"] for name in places} == pytest.approx(alone, rel=1e-5)
    assert found["forgetting_kl"] == pytest.approx(sum(alone.values()) / 2, rel=1e-5)
    values, weights = (of["forgetting_kl"] for of in (both.examples, both.weights))
    assert len(set(weights.tolist())) == 2  # the texts have different lengths
    assert ((values * weights).sum() / weights.sum()).item() == pytest.approx(found["forgetting_kl"], rel=1e-5)
    one = ForgettingMonitor({"sums": str(text)}, **options)  # what is asked for by a single name counts as well
    one.setup(trainer, lm, "validate")
    assert one.measure(trainer, lm)["forgetting_kl"] == pytest.approx(alone["sums"], rel=1e-5)


def test_a_monitor_reads_its_text_anew_for_another_model(text: Path, tmp_path: Path) -> None:
    """As in a loop over models: the tokens of the first one's tokenizer mean other words to the second."""
    trainer, found = quiet_trainer(tmp_path), []
    monitor = ForgettingMonitor(str(text), block_length=16, max_tokens=64)
    for tokenizer in (tiny_tokenizer(), make_tokenizer(adds_specials=True)):
        lm = LanguageModel()
        lm.lm = tiny_model("gpt2", vocab_size=len(make_tokenizer()))
        lm.tokenizer = tokenizer
        inject(lm, LoRAConfig(r=2))
        initialize(lm)
        monitor.setup(trainer, lm, "validate")
        monitor.measure(trainer, lm)
        found.append(monitor._tokens(lm)[""].tolist())
        assert found[-1] == pack(read_texts(str(text)), tokenizer, 16, 64).tolist()
    assert found[0] != found[1]


def test_two_monitors_of_a_kind_are_refused(text: Path, tmp_path: Path) -> None:
    """Lightning would log the mean of what both measure."""
    monitors = [ForgettingMonitor(str(text)), ForgettingMonitor(str(text))]
    trainer = quiet_trainer(tmp_path, callbacks=monitors)
    with pytest.raises(ValueError, match=r"two callbacks ForgettingMonitor.*several texts by names"):
        monitors[0].setup(trainer, LanguageModel(), "fit")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sanity", [0, -1])
def test_nothing_is_forgotten_before_training_and_something_after(
    dtype: str, sanity: int, text: Path, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    logged: list[dict[str, float]] = []

    class Logged(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            logged.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("forgetting")})

    monitor = ForgettingMonitor(str(text), block_length=16, max_tokens=160)
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=1,
        num_sanity_val_steps=sanity,
        callbacks=[MiLoRAInit(r=4, lora_dropout=0.5), monitor, Logged()],
    )
    lm = module(model, dtype=dtype, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    trainer.fit(lm, data(tmp_path, model, num_generation_examples=0))

    blocks = pack(read_texts(str(text)), lm.tokenizer, 16, 160)
    last = logged[-1]
    assert last["forgetting_kl"] > 1e-5
    assert monitor.measure(trainer, lm.train()) == pytest.approx(last)  # dropout is off, whatever the mode
    lm.eval()
    fresh = module(model, dtype=dtype)
    fresh.configure_model()
    p = fresh.model.eval()(blocks).logits.double().log_softmax(-1)
    q = lm.model(blocks).logits.double().log_softmax(-1)
    kl, entropy = (p.exp() * (p - q)).sum(-1).mean().item(), -(p.exp() * p).sum(-1).mean().item()
    assert last["forgetting_kl"] == pytest.approx(kl, rel=1e-3)
    assert last["forgetting_cross_entropy"] == pytest.approx(entropy + kl, rel=1e-5)
    assert len(logged) == 1 + bool(sanity)
    if sanity:
        first = logged[0]
        assert first["forgetting_kl"] == 0
        assert first["forgetting_cross_entropy"] == pytest.approx(entropy, rel=1e-5)


def test_values_from_before_training_reach_the_logger_and_the_mode_is_kept(text: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    for sanity in (0, 2):
        logger = CSVLogger(tmp_path / "logs", flush_logs_every_n_steps=1)
        monitor = ForgettingMonitor(str(text), block_length=16, max_tokens=64, tokenizer=str(model))
        callbacks = [MiLoRAInit(r=4, lora_dropout=0.5), monitor]
        trainer = quiet_trainer(
            tmp_path,
            max_epochs=1,
            limit_train_batches=2,
            logger=logger,
            num_sanity_val_steps=sanity,
            callbacks=callbacks,
        )
        lm = module(model)
        trainer.fit(lm, data(tmp_path, model, num_generation_examples=0))
        header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        values = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
        steps = {int(v["step"]): float(v["forgetting_kl"]) for v in values if v["forgetting_kl"]}
        assert steps[0] == 0 < steps[1]
        assert all(m.training for m in lm.model.modules() if hasattr(m, "lora_dropout"))


def test_what_trains_beside_adapters_is_measured_against_its_start(text: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    monitor = ForgettingMonitor(str(text), block_length=16, max_tokens=64)
    callbacks = [MiLoRAInit(r=4, modules_to_save=["norm", "embed_tokens"]), monitor]
    trainer = quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=2, callbacks=callbacks)
    lm = module(model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    trainer.fit(lm, data(tmp_path, model, num_generation_examples=0))
    fresh = module(model)
    fresh.configure_model()
    blocks = pack(read_texts(str(text)), lm.tokenizer, 16, 64)
    p, q = (x.model.eval()(blocks).logits.detach().double().log_softmax(-1) for x in (fresh, lm))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl > 1e-3
    assert monitor.measure(trainer, lm)["forgetting_kl"] == pytest.approx(kl, rel=1e-3)
    late = ForgettingMonitor(str(text), block_length=16, max_tokens=64)
    late.setup(trainer, lm, "fit")
    with pytest.raises(ValueError, match=r"trains besides the adapters.*only from its beginning"):
        late.measure(trainer, lm)


def test_modules_that_cannot_be_measured_are_refused(text: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    options = {"max_steps": 1, "num_sanity_val_steps": 0}

    def fit(text: str, lm: LightningModule, **adapter: Any) -> None:
        callbacks = [MiLoRAInit(r=4, **adapter), ForgettingMonitor(text, block_length=16)]
        quiet_trainer(tmp_path, callbacks=callbacks, **options).fit(
            lm, data(tmp_path, model) if isinstance(lm, CausalLMModule) else None
        )

    with pytest.raises(ValueError, match="no Hugging Face model, and ForgettingMonitor measures"):
        fit(str(text), Regression())
    encodes = LanguageModel()
    encodes.lm = T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is no causal language model"):
        ForgettingMonitor(str(text)).on_fit_start(quiet_trainer(tmp_path), encodes)
    with pytest.raises(ValueError, match="LanguageModel has no attribute tokenizer"):
        fit(str(text), LanguageModel())
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        fit("absent.txt", module(model))
    trainer = quiet_trainer(tmp_path, strategy=FSDP1OnCPU(), **options)
    with pytest.raises(ValueError, match=r"under FSDPStrategy \(FSDP1\): use FSDP2"):
        ForgettingMonitor(str(text)).setup(trainer, module(model), "fit")
