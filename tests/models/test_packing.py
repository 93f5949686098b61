"""Examples that share a row are as they are alone: in their logits, the loss, its gradient, and how often they come."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from helpers.models import _SIZES, TINY_CONFIGS, quiet_trainer, save_tiny_model, write_examples
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    FalconH1Config,
    Gemma3TextConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule
from milora_lightning.data import Collator, Files
from milora_lightning.data.batches.packing import PackedDataset, PackingCollator, pack
from milora_lightning.models import segments
from milora_lightning.models.attention import NAME as CAUSAL_BLOCKS
from milora_lightning.models.loss import causal_lm_loss, supervised_logits
from milora_lightning.models.packed_rows import check_separation, check_takes_positions
from milora_lightning.models.segments import positions_of

CONFIGS = {
    **{name: TINY_CONFIGS[name] for name in ("llama", "qwen3", "gemma2", "gpt2")},
    "gemma3": Gemma3TextConfig(**_SIZES, sliding_window=5),
    "mistral": MistralConfig(**_SIZES, sliding_window=4),
}
CONFIGS["gemma2"] = type(CONFIGS["gemma2"])(**{**CONFIGS["gemma2"].to_dict(), "sliding_window": 5})
IMPLEMENTATIONS = [(name, how) for name in CONFIGS for how in ("sdpa", "eager") if (name, how) != ("gemma2", "sdpa")]


def model_of(name: str, implementation: str = "sdpa", config: Any = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config or CONFIGS[name]), attn_implementation=implementation
    ).eval()
    for parameter in model.parameters():  # so that attention matters
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return model


def examples(*lengths: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(5, 128, (length,), generator=generator).tolist()
        middle = length // 2
        rows.append({"input_ids": ids, "spans": [max(1, middle - 2), middle, middle + 1, length]})
    return rows


ROWS = [examples(9, 14, 7, 12), examples(20, 11, seed=1)]


@pytest.mark.parametrize(("name", "implementation"), [*IMPLEMENTATIONS, ("llama", CAUSAL_BLOCKS)])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_loss_and_gradient_are_those_of_the_examples_one_by_one(name: str, implementation: str, head: str) -> None:
    model = model_of(name, implementation)
    model.get_output_embeddings().requires_grad_(head == "trained")

    def loss_and_gradients(batches: list[dict[str, Any]]) -> tuple[torch.Tensor, int, list[torch.Tensor]]:
        model.zero_grad()
        total = sum(causal_lm_loss(model, b["input_ids"], b["labels"], b.get("position_ids")) for b in batches)
        total.backward()
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        return total.detach(), tokens, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone, tokens, expected = loss_and_gradients([Collator(0, 1)([e]) for row in ROWS for e in row])
    packed, packed_tokens, gradients = loss_and_gradients([PackingCollator(0)(ROWS)])
    assert tokens == packed_tokens
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()) + 1e-7)
    # negative control: without the positions, examples attend to those before them
    mixed = {**PackingCollator(0)(ROWS), "position_ids": None}
    assert abs(loss_and_gradients([mixed])[0] / alone - 1) > 1e-4


@pytest.mark.parametrize(("name", "implementation"), [*IMPLEMENTATIONS, ("llama", CAUSAL_BLOCKS)])
def test_logits_do_not_change_with_the_neighbour(name: str, implementation: str) -> None:
    model = model_of(name, implementation)
    first, second, other = examples(13, 17, 13)
    with torch.no_grad():
        logits = []
        for row in ([first, second], [other, second]):
            batch = PackingCollator(0, 1)([row])
            batch["labels"][:, :14] = -100
            logits.append(supervised_logits(model, batch["input_ids"], batch["labels"], batch["position_ids"]))
        assert torch.equal(*logits)
        batch = PackingCollator(0, 1)([[other, second]])
        batch["labels"][:, :14] = -100
        control = supervised_logits(model, batch["input_ids"], batch["labels"])
        assert not torch.allclose(control, logits[0], atol=1e-3)


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_examples_apart_pass_the_trial(name: str, implementation: str, dtype: torch.dtype) -> None:
    model = model_of(name, implementation).to(dtype).train()
    model.model.eval() if hasattr(model, "model") else model.transformer.eval()
    modes = [module.training for module in model.modules()]
    check_separation(model, examples(31)[0]["input_ids"])
    assert [module.training for module in model.modules()] == modes


def test_flash_attention_gets_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the positions alone it keeps examples apart in a single row only."""
    model, batch = model_of("llama"), PackingCollator(0)(ROWS)
    expected = causal_lm_loss(model, batch["input_ids"], batch["labels"], batch["position_ids"])
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(
        type(model.config), "_attn_implementation", property(lambda _: "sdpa" if seen else "flash_attention_2")
    )
    packed = causal_lm_loss(model, batch["input_ids"], batch["labels"], batch["position_ids"])
    torch.testing.assert_close(packed, expected)
    assert seen == [(1, batch["input_ids"].numel())]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4), "takes no position_ids, by which packed"),
        (MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2), "takes no position_ids"),
        (FalconH1Config(**_SIZES, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8), "set data.packing to false"),
        (TINY_CONFIGS["opt"], r"OPT.* packed row changes with its neighbour \(its logits differ by .*packing to f"),
    ],
    ids=["bloom", "mamba", "falcon-h1", "opt"],
)
def test_models_that_would_mix_examples_are_refused(config: Any, problem: str) -> None:
    model = model_of("", "eager", config)
    with pytest.raises(ValueError, match=problem):
        check_separation(model, examples(16)[0]["input_ids"])


def test_recurrent_layers_are_refused_by_name() -> None:
    model = model_of("llama")
    check_takes_positions(model)
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="has layers of linear_attention, which see all of a packed row: set data"):
        check_takes_positions(model)


@pytest.mark.parametrize("seed", range(3))
def test_every_example_is_in_one_row(seed: int) -> None:
    lengths = torch.randint(1, 101, (2000,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = pack(lengths, 100, seed)
    assert Counter(i for row in rows for i in row) == Counter(range(2000))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 100
    assert sum(filled) / (100 * len(rows)) > 0.98
    assert pack(lengths, 100, seed) == rows
    assert pack(lengths, 100, seed + 1) != rows


def test_rows_hold_their_examples() -> None:
    given = examples(9, 14, 7, 12, 20, 11)
    lengths = [len(e["input_ids"]) for e in given]
    packed = PackedDataset(datasets.Dataset.from_list(given), lengths, 32)
    found = [e for i in range(len(packed)) for e in packed[i]]
    assert sorted(e["input_ids"] for e in found) == sorted(e["input_ids"] for e in given)
    assert packed.lengths == [sum(len(e["input_ids"]) for e in packed[i]) for i in range(len(packed))]


def data_of(folder: Path, model: Path, **options: Any) -> SFTDataModule:
    return SFTDataModule(
        Files(str(write_examples(folder / "train.jsonl", 40))), str(model), "plain", max_length=64, **options
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), "llama")


def test_a_run_on_packed_rows_is_that_on_the_examples(base: Path, tmp_path: Path) -> None:
    """With all examples in each step: accumulated over rows, or in one batch."""
    states = {}
    for packing, batch_size, accumulate in ((False, 40, 1), (True, 40, 1), (True, 3, 100)):
        lm = CausalLMModule(str(base), optimizer=lambda params: torch.optim.SGD(params, lr=0.1), warmup_steps=0)
        data = data_of(tmp_path, base, packing=packing, batch_size=batch_size)
        trainer = quiet_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[MiLoRAInit(r=2)])
        trainer.fit(lm, data)
        assert trainer.global_step == 2
        states[packing, batch_size] = {n: p.detach() for n, p in lm.named_parameters() if p.requires_grad}
    reference = states.pop((False, 40))
    assert reference
    for state in states.values():
        for name, parameter in reference.items():
            torch.testing.assert_close(state[name], parameter, rtol=1e-4, atol=1e-6)


def test_ranks_share_the_rows_and_a_resumed_run_goes_on(base: Path, tmp_path: Path) -> None:
    whole = data_of(tmp_path, base, packing=True, batch_size=2)
    whole.setup("fit")
    order = [batch["input_ids"] for batch in whole.train_dataloader()]
    rows = [row[row != 0].tolist() for batch in order for row in batch]
    shares = []
    for rank in range(2):
        data = data_of(tmp_path, base, packing=True, batch_size=1)
        data._rank = lambda rank=rank: {"num_replicas": 2, "rank": rank}  # type: ignore[method-assign]
        data.setup("fit")
        shares.append([row[row != 0].tolist() for batch in data.train_dataloader() for row in batch["input_ids"]])
    interleaved = [row for pair in zip(*shares, strict=True) for row in pair]
    assert interleaved[: len(rows)] == rows


def test_a_resumed_run_goes_on_where_it_was(base: Path, tmp_path: Path) -> None:
    def run(stop: int, ckpt: Path | None = None) -> CausalLMModule:
        lm = CausalLMModule(str(base), lr_scheduler="constant", warmup_steps=0)
        trainer = quiet_trainer(tmp_path, max_epochs=3, max_steps=stop, callbacks=[MiLoRAInit(r=2)])
        trainer.fit(lm, data_of(tmp_path, base, packing=True, batch_size=3), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{stop}.ckpt")
        return lm

    straight = run(8)
    run(5)
    resumed = run(8, tmp_path / "5.ckpt")
    for name, parameter in straight.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter, rtol=0, atol=0)


def varlen_reference(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """What flash attention computes, with the sequences that transformers' own code finds in what the layers pass."""
    positions = options["position_ids"]
    assert attention_mask is None
    assert flash._is_packed_sequence(positions, len(query))
    (starts, _), _ = flash.prepare_fa_kwargs_from_position_ids(positions)
    return attend_apart(query, key, value, starts, options)


def attend_apart(query: Any, key: Any, value: Any, starts: torch.Tensor, options: dict[str, Any]) -> Any:
    outputs = []
    for start, stop in pairwise(starts.tolist()):
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        window = options.get("sliding_window") or stop
        seen = (distance >= 0) & (distance < window)
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * options["scaling"]
        if (cap := options.get("softcap")) is not None:
            scores = (scores / cap).tanh() * cap
        outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, 2).transpose(1, 2), None


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "mistral"])
def test_flash_attention_finds_the_examples_by_what_models_pass_it(name: str) -> None:
    AttentionInterface.register("varlen_reference", varlen_reference)
    AttentionMaskInterface.register("varlen_reference", flash_attention_mask)
    reference, model = model_of(name, "eager"), model_of(name, "varlen_reference")
    batch = PackingCollator(0)(ROWS)
    inputs = [batch[key] for key in ("input_ids", "labels", "position_ids")]
    expected = causal_lm_loss(reference, *inputs)
    flat = [x.reshape(1, -1) for x in inputs]  # as attention_rows does for flash attention
    torch.testing.assert_close(causal_lm_loss(model, *flat), expected, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_flex_attention_keeps_examples_apart() -> None:
    """Which compiles its masks, on CPUs with a C++ compiler."""
    model, (first, second, other) = model_of("llama", "flex_attention"), examples(13, 17, 13)
    logits = []
    for neighbour in (first, other):
        batch = PackingCollator(0, 1)([[neighbour, second]])
        batch["labels"][:, :14] = -100
        with torch.no_grad():
            logits.append(supervised_logits(model, batch["input_ids"], batch["labels"], batch["position_ids"]))
            control = supervised_logits(model, batch["input_ids"], batch["labels"])
    assert torch.equal(*logits)
    assert not torch.allclose(control, logits[0], atol=1e-3)


def test_an_attention_that_forgets_the_mask_is_refused() -> None:
    def forgetful(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **options)

    AttentionInterface.register("forgetful", forgetful)
    AttentionMaskInterface.register("forgetful", sdpa_mask)
    with pytest.raises(ValueError, match="'forgetful' for an example in a packed row changes with its neighbour"):
        check_separation(model_of("llama", "forgetful"), examples(16)[0]["input_ids"])


# ---- A batch in one row ----


def padded_and_flat(lengths: tuple[int, ...], model: PreTrainedModel) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Loss and gradients of a padded batch, of the same examples in one row, and of that row with no boundaries."""
    rows = examples(*lengths)
    flat = PackingCollator(0, one_row=True)(rows)
    assert flat["input_ids"].shape[0] == 1
    mixed = {**flat, "position_ids": None}
    mixed.pop("cu_seq_lens")
    results = []
    for batch in (Collator(0)(rows), flat, mixed):
        model.zero_grad()
        total = causal_lm_loss(model, batch["input_ids"], batch["labels"], positions_of(batch))
        total.backward()
        results.append((total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    return results


@pytest.mark.parametrize(("name", "implementation"), [*IMPLEMENTATIONS, ("llama", CAUSAL_BLOCKS)])
def test_a_batch_in_one_row_is_the_padded_batch(name: str, implementation: str) -> None:
    (padded, expected), (flat, gradients), (mixed, _) = padded_and_flat((9, 14, 7, 12), model_of(name, implementation))
    torch.testing.assert_close(flat, padded, rtol=1e-5, atol=0)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()) + 1e-7)
    assert abs(mixed / padded - 1) > 1e-4  # negative control


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2"])
def test_flash_attention_is_told_the_boundaries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it neither looks for them in the positions, nor waits for the device."""

    def varlen(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        starts = options["cu_seq_lens_q"]
        assert options["max_length_q"] == options["max_length_k"] == int(starts.diff().max())
        assert torch.equal(starts, options["cu_seq_lens_k"])
        assert attention_mask is None
        return attend_apart(query, key, value, starts, {"scaling": query.shape[-1] ** -0.5, **options})

    # Under a name of its own, because transformers looks for a kernel behind any name with "flash" in it.
    AttentionInterface.register("told", varlen)
    AttentionMaskInterface.register("told", flash_attention_mask)
    monkeypatch.setattr(segments, "attention_of", lambda _: "flash_attention_2")
    rows = examples(9, 14, 7, 12)
    batch, flat = Collator(0)(rows), PackingCollator(0, one_row=True)(rows)
    expected = causal_lm_loss(model_of(name, "eager"), batch["input_ids"], batch["labels"])
    model = model_of(name, "told")
    found = causal_lm_loss(model, flat["input_ids"], flat["labels"], positions_of(flat))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    check_separation(model, rows[1]["input_ids"])


def test_a_run_in_one_row_is_that_on_padded_batches(base: Path, tmp_path: Path) -> None:
    states = []
    for options in ({"padding_free": False}, {"padding_free": True}, {"padding_free": True, "packing": True}):
        lm = CausalLMModule(str(base), optimizer=lambda params: torch.optim.SGD(params, lr=0.1), warmup_steps=0)
        trainer = quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[MiLoRAInit(r=2)])
        trainer.fit(lm, data_of(tmp_path, base, batch_size=40, **options))
        assert trainer.global_step == 2
        states.append({n: p.detach() for n, p in lm.named_parameters() if p.requires_grad})
    for state in states[1:]:
        for name, parameter in states[0].items():
            torch.testing.assert_close(state[name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("attention", "asked", "one_row"), [("flash", "auto", True), ("flash", False, False), ("sdpa", "auto", False)]
)
def test_what_auto_means(
    attention: str, asked: Any, one_row: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "flash":
        monkeypatch.setattr(segments, "attention_of", lambda _: "flash_attention_2")
    shapes = []

    class Watched(CausalLMModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            shapes.append(tuple(batch["input_ids"].shape))
            return super().training_step(batch, batch_idx)

    lm = Watched(str(base), attn_implementation="sdpa")  # which finds the examples by their positions
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=2)], limit_val_batches=0)
    trainer.fit(lm, data_of(tmp_path, base, batch_size=4, padding_free=asked))
    assert (shapes[0][0] == 1) == one_row


def test_a_model_that_takes_no_positions_is_refused_where_one_row_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_tiny_model(tmp_path / "mamba", "llama")
    AutoModelForCausalLM.from_config(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)).save_pretrained(
        folder
    )
    lm = CausalLMModule(str(folder))
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=2)])
    with pytest.raises(ValueError, match=r"takes no position_ids, .*: set data.padding_free to false"):
        trainer.fit(lm, data_of(tmp_path, folder, batch_size=4, padding_free=True))
