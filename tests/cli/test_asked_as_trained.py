from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat_templates import TEMPLATES
from helpers.chats import folder_of
from helpers.command_line import run
from helpers.models import quiet_trainer, write_examples

from milora_lightning import CausalLMModule, SFTDataModule
from milora_lightning.data import Files

OTHER = "prompts of another format"


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Trains a small model on conversations, and returns its checkpoint; there are bare questions to test on."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "base", "qwen")
    turns = [{"role": role, "content": text} for role, text in [("user", "1 plus 1?"), ("assistant", "It is 2")] * 2]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    write_examples(tmp_path / "questions.jsonl", 3)

    def train(*options: str) -> str:
        data = ["--data.source.train", "chats.jsonl", "--data.batch_size=2", "--data.source.validation_size=0"]
        steps = ["--trainer.max_steps=1", "--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=saved"]
        run("fit", "--model.name_or_path=base", "--adapter.r=2", *data, *steps, *QUIET, *options)
        (path,) = (tmp_path / "saved").glob("*.ckpt")
        return str(path)

    return train


QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
QUESTIONS = ["--data.source.test=questions.jsonl", "--model.max_new_tokens=2", *QUIET]


def prompts(data: SFTDataModule) -> list[str]:
    return [data.tokenizer_object.decode(e["input_ids"][: e["prompt_length"]]) for e in data.examples("test")]


@pytest.mark.parametrize("command", ["test", "predict"])
def test_questions_are_asked_as_the_checkpoint_was_trained(
    command: str, trained: Callable[..., str], recwarn: pytest.WarningsRecorder
) -> None:
    path = trained("--data.prompt_suffix=Now:", "--data.train_on=last")
    cli = run(command, "--ckpt_path", path, *QUESTIONS)
    assert not [w for w in recwarn if OTHER in str(w.message)]
    assert cli.datamodule.prompt_format == cli.model.prompt_format
    assert all("<|im_start|>user\nWhat is" in prompt for prompt in prompts(cli.datamodule))
    assert all(prompt.endswith("<|im_start|>assistant\nNow:") for prompt in prompts(cli.datamodule))
    assert cli.datamodule.train_on == "last"


def test_prompts_that_were_learned_are_part_of_the_loss_of_a_test(trained: Callable[..., str]) -> None:
    path = trained("--data.source.train=questions.jsonl", "--data.train_on_inputs=true", "--data.template=metamath")
    cli = run("test", "--ckpt_path", path, *QUESTIONS)
    assert cli.datamodule.train_on_inputs
    assert [example["spans"][0] for example in cli.datamodule.examples("test")] == [0] * 3
    assert cli.datamodule.template == "metamath"
    with pytest.raises(SystemExit, match=r"Row 1 of the train data is a conversation, and train_on_inputs is for"):
        trained("--data.train_on_inputs=true")


def test_a_template_from_a_file_comes_from_the_checkpoint(trained: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATES["qwen"][0].replace("a helpful assistant", "a mathematician"))
    path = trained("--data.template=mine.jinja")
    (tmp_path / "mine.jinja").unlink()
    cli = run("test", "--ckpt_path", path, *QUESTIONS)
    assert all("You are a mathematician" in prompt for prompt in prompts(cli.datamodule))


def test_what_is_named_wins_with_a_warning(trained: Callable[..., str]) -> None:
    path = trained()
    with pytest.warns(UserWarning, match=rf"{OTHER}: template='chat', here it is 'alpaca'\. Set data\.template: chat"):
        cli = run("test", "--ckpt_path", path, *QUESTIONS, "--data.template=alpaca", "--data.train_on=[user]")
    assert all("### Instruction" in prompt for prompt in prompts(cli.datamodule))
    assert cli.datamodule.train_on == ["user"]
    # a run that goes on in training decides by its data, as it did
    cli = run("fit", "--ckpt_path", path, "--data.source.train=chats.jsonl", "--trainer.max_steps=2", *QUIET)
    assert cli.datamodule.template == "auto"


def test_a_module_from_a_checkpoint_says_that_other_data_ask_otherwise(trained: Callable[..., str]) -> None:
    module = CausalLMModule.load_from_checkpoint(trained(), map_location="cpu", max_new_tokens=2)
    trainer = quiet_trainer(Path.cwd())

    def data(template: str) -> Any:
        return SFTDataModule(Files(test="questions.jsonl"), "base", template=template)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{OTHER}")
        trainer.test(module, data("chat"), verbose=False)
    with pytest.warns(UserWarning, match=rf"{OTHER}: template='chat', here it is 'alpaca'"):
        trainer.test(module, data("auto"), verbose=False)
    assert torch.is_tensor(trainer.callback_metrics["test_loss"])
