"""Tokens and positions that a model has not are refused before any work, in one sentence with both numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_fixtures import InMemory, make_tokenizer
from helpers.models import TINY_CONFIGS, quiet_trainer, save_tiny_model, tiny_tokenizer
from lightning.pytorch import LightningModule
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, RobertaConfig

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule, lora_layers
from milora_lightning.models.limits import PositionLimit, check_positions, embedding_rows, position_limit

SHORT, LONG = ("a " * 3, "b"), ("a " * 20, "b " * 30)
LEARNED = ["gpt2", "opt"]


def data(model: Any, *rows: tuple[str, str], **options: Any) -> SFTDataModule:
    source = InMemory(train=list(rows) * 4, validation=list(rows) * 2, test=list(rows))
    defaults = {"template": "plain", "max_length": 128, "batch_size": 2, "num_generation_examples": 1}
    return SFTDataModule(source, model, **{**defaults, **options})


def trainer(folder: Path, **options: Any) -> Any:
    return quiet_trainer(folder, max_steps=1, num_sanity_val_steps=0, callbacks=[MiLoRAInit(r=2)], **options)


def model_of(kind: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(TINY_CONFIGS[kind])


@pytest.mark.parametrize("kind", list(TINY_CONFIGS))
def test_positions_are_known(kind: str) -> None:
    """Those that have a table of them fail beyond it, the others do not."""
    model = model_of(kind)
    assert position_limit(model) == PositionLimit(64, kind in LEARNED)
    assert embedding_rows(model) == 128
    model(input_ids=torch.ones(1, 64, dtype=torch.int64))
    beyond = torch.ones(1, 65, dtype=torch.int64)
    if kind in LEARNED:
        with pytest.raises(IndexError):
            model(input_ids=beyond)
    else:
        model(input_ids=beyond)


def test_positions_of_other_kinds() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=34, is_decoder=True, pad_token_id=1)
    assert position_limit(AutoModelForCausalLM.from_config(roberta)) == PositionLimit(32, True)
    assert (
        position_limit(AutoModelForCausalLM.from_config(BloomConfig(vocab_size=99, hidden_size=32, n_layer=1))) is None
    )
    gptj = AutoConfig.for_model("gptj", vocab_size=99, n_embd=32, n_layer=1, n_head=2, n_positions=48, rotary_dim=4)
    assert position_limit(AutoModelForCausalLM.from_config(gptj)) == PositionLimit(48, True)
    mpt = AutoConfig.for_model("mpt", vocab_size=99, d_model=32, n_layers=1, n_heads=2, max_seq_len=40)
    assert position_limit(AutoModelForCausalLM.from_config(mpt)) == PositionLimit(40, True)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_too_long_examples_are_refused_where_there_are_no_positions(kind: str, stage: str, tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path / kind, kind))
    split = {"fit": "train", "validate": "validation", "test": "test"}[stage]
    lm = CausalLMModule(path, max_new_tokens=4)
    message = (
        rf"example of the {split} data has 102 tokens, but \w+ has 64 positions and none beyond: set max_length to 64"
    )
    with pytest.raises(ValueError, match=message):
        getattr(trainer(tmp_path), stage)(lm, datamodule=data(path, LONG))
    assert not lora_layers(lm)  # before anything is decomposed


def test_too_long_examples_are_mentioned_where_positions_are_computed(tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path / "llama", "llama"))
    with pytest.warns(
        UserWarning, match="has 102 tokens, but LlamaForCausalLM has 64 positions and was not trained on any"
    ):
        trainer(tmp_path, limit_val_batches=0).fit(CausalLMModule(path), datamodule=data(path, LONG))


def test_what_is_mentioned_is_mentioned_once_in_a_run(tmp_path: Path) -> None:
    """However often the data is asked for, and whoever changes Python's filters meanwhile; of another model again."""
    path = str(save_tiny_model(tmp_path / "llama", "llama"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            run = quiet_trainer(
                tmp_path, max_epochs=2, callbacks=[MiLoRAInit(r=2)], reload_dataloaders_every_n_epochs=1
            )
            run.fit(CausalLMModule(path, max_new_tokens=2), datamodule=data(path, LONG))
    about = [str(each.message) for each in said if "was not trained on any" in str(each.message)]
    assert len(set(about)) == 2  # of the training data and of the validation data
    assert len(about) == 2 * 2


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_answers_beyond_the_positions_are_refused(stage: str, tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path / "gpt2", "gpt2"))
    run = trainer(tmp_path)
    examples = data(path, SHORT, max_length=32)
    examples.setup(None)
    prompt = max(examples.examples("test")["prompt_length"])
    most = 64 - prompt + 1  # the last token is not read again
    message = rf"has {prompt} tokens, and max_new_tokens={most + 1} may follow, but GPT2LMHeadModel has 64 positions"
    with pytest.raises(ValueError, match=message):
        getattr(run, stage)(CausalLMModule(path, max_new_tokens=most + 1), datamodule=examples)
    lm = CausalLMModule(path, max_new_tokens=most)
    getattr(trainer(tmp_path), stage)(lm, datamodule=data(path, SHORT, max_length=32))
    if stage == "fit":  # nothing is answered: no matter how long
        lm = CausalLMModule(path, max_new_tokens=99)
        trainer(tmp_path).fit(lm, datamodule=data(path, SHORT, max_length=32, num_generation_examples=0))
        trainer(tmp_path, limit_val_batches=0).fit(lm, datamodule=data(path, SHORT, max_length=32))


def test_padding_needs_positions_too() -> None:
    model = AutoModelForCausalLM.from_config(
        type(TINY_CONFIGS["gpt2"])(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=60)
    )
    check_positions(model, {"train": 60}, {}, 1, padded=4)
    with pytest.raises(
        ValueError, match=r"60 tokens, padded to 64, .* 60 positions and none beyond: set max_length to 56"
    ):
        check_positions(model, {"train": 60}, {}, 1, padded=8)


def with_more_tokens(folder: Path, pad: bool) -> str:
    """A model's folder whose tokenizer has more tokens than the model, padding among them or not."""
    path = save_tiny_model(folder, "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    if pad:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)
    return str(path)


def test_tokens_without_embedding_are_refused(tmp_path: Path) -> None:
    padded, unpadded = with_more_tokens(tmp_path / "a", True), with_more_tokens(tmp_path / "b", False)
    with pytest.raises(
        ValueError,
        match=r"padding token '\[PAD\]' has the id 129, but Llama.* embeddings for 128 tokens, .*"
        r"Set tokenizer\.pad_token to one that the model has, '</s>' for example",
    ):
        trainer(tmp_path).fit(CausalLMModule(padded), datamodule=data(padded, SHORT))
    with pytest.raises(
        ValueError, match=r"train data contains the token '<new>' with the id 128 \(the tokenizer has 129 tokens\)"
    ):
        trainer(tmp_path).fit(CausalLMModule(unpadded), datamodule=data(unpadded, ("say <new>", "b")))
    trainer(tmp_path).fit(CausalLMModule(unpadded, max_new_tokens=2), datamodule=data(unpadded, SHORT))  # none is used


class Own(LightningModule):
    """Somebody's own module around a model of transformers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = model_of(kind)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_any_module_on_the_data_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has 64 positions and none beyond"):
        trainer(tmp_path).fit(Own("gpt2"), datamodule=data(tiny_tokenizer(), LONG))
    trainer(tmp_path, limit_val_batches=0).fit(Own("gpt2"), datamodule=data(tiny_tokenizer(), SHORT))


def test_tokenizers_without_a_padding_token_pad_all_the_same(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    examples = data(tokenizer, SHORT, ("a", "b"))
    examples.setup("fit")
    batch = next(iter(examples.train_dataloader()))
    assert ((batch["labels"] == -100) | (batch["attention_mask"] == 1)).all()
    assert batch["labels"].max() == batch["input_ids"][batch["labels"] != -100].max()
