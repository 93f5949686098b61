"""Checkpoints and exports hold how prompts were written, so that what serves a model asks as it was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers.chat_templates import TEMPLATES, chat_tokenizer
from helpers.chats import folder_of, ids_of
from helpers.data_fixtures import make_tokenizer, with_a_space_before_texts
from helpers.models import quiet_trainer, save_tiny_model, tiny_tokenizer, write_examples
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from milora_lightning import AdapterExport, CausalLMModule, MiLoRAInit, SFTDataModule
from milora_lightning.cli.main import main
from milora_lightning.data import Files, tokenize_dataset
from milora_lightning.data.encoding.prompt_format import PromptFormat

SUFFIX = 'Let\'s "think" {{ step }} \\ by %} step: é😀\n'


def trained_ids(
    tokenizer: PreTrainedTokenizerBase, template: Any, suffix: str, prompt: str, input: str = "", response: str = "3"
) -> tuple[list[int], list[int]]:
    """Token ids of a training example: its prompt, and all of it."""
    row = {"prompt": prompt, "input": input, "response": response}
    (example,) = tokenize_dataset(datasets.Dataset.from_list([row]), tokenizer, template, suffix)
    return example["input_ids"][: example["prompt_length"]], example["input_ids"]


@pytest.mark.parametrize("suffix", ["", SUFFIX])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_exported_tokenizer_asks_as_in_training(template: Any, adds_bos: bool, suffix: str, tmp_path: Path) -> None:
    """Of one user's message, of a system message with it, and of a whole chat; BOS included."""
    tokenizer = make_tokenizer(adds_specials=adds_bos)
    prompt_format = PromptFormat.of(tokenizer, template, suffix)
    prompt_format.applied_to(tokenizer).save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    user = {"role": "user", "content": " Add {1} and\n2. "}
    system = {"role": "system", "content": "Answer in one word."}
    prompt, whole = trained_ids(tokenizer, template, suffix, user["content"])
    assert ids_of(exported, [user], add_generation_prompt=True) == prompt
    assert ids_of(exported, [user, {"role": "assistant", "content": "3"}]) == whole
    asked = ids_of(exported, [system, user], add_generation_prompt=True)
    assert asked == trained_ids(tokenizer, template, suffix, system["content"], user["content"])[0]
    assert ids_of(tokenizer, [user], add_generation_prompt=True) != prompt  # negative control: its own template


@pytest.mark.parametrize("template", ["alpaca", "metamath", "llm-adapters", "tulu"])
@pytest.mark.parametrize("make", [make_tokenizer, with_a_space_before_texts])
def test_exported_tokenizer_asks_as_in_tests(template: Any, make: Any) -> None:
    """Where prompts to answer differ from those of training, the former are what an export writes."""
    tokenizer = make()
    prompt_format = PromptFormat.of(tokenizer, template, "", " So:")
    asked = prompt_format.applied_to(tokenizer)
    for prompt, input in (("Add.", ""), ("Add.\n\n### Input: 3", "1\n\n2")):
        row = {"prompt": prompt, "input": input, "response": "3"}
        (example,) = tokenize_dataset([row], tokenizer, template, " So:", asks=True)
        messages = [{"role": "user", "content": input or prompt}]
        if input:
            messages.insert(0, {"role": "system", "content": prompt})
        want = example["input_ids"][: example["prompt_length"]]
        assert ids_of(asked, messages, add_generation_prompt=True) == want
        (trained,) = tokenize_dataset([row], tokenizer, template)
        assert trained["prompt"] != example["prompt"]
    assert PromptFormat.found_in({"data": {"prompt_format": prompt_format.record()}}) == prompt_format
    old = {name: value for name, value in prompt_format.record().items() if name != "generation_prompt_suffix"}
    assert PromptFormat(**old).asking_suffix == ""


@pytest.mark.parametrize("suffix", ["", "So: "])
@pytest.mark.parametrize("name", ["qwen", "gemma", "mistral"])
def test_a_chat_keeps_the_template_of_the_tokenizer(name: str, suffix: str) -> None:
    tokenizer = chat_tokenizer(name)
    prompt_format = PromptFormat.of(tokenizer, "chat", suffix if name == "qwen" else "")
    asked = prompt_format.applied_to(tokenizer)
    user = {"role": "user", "content": "Add."}
    prompt, _ = trained_ids(tokenizer, "chat", prompt_format.prompt_suffix, "Add.")
    assert ids_of(asked, [user], add_generation_prompt=True) == prompt
    assert (asked is tokenizer) == (not prompt_format.prompt_suffix)
    assert prompt_format.end_of_turn == TEMPLATES[name][1]
    assert tokenizer.chat_template == TEMPLATES[name][0]  # the user's own object is left alone


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_a_space_that_tokenizers_put_before_texts_is_written(template: Any) -> None:
    tokenizer = with_a_space_before_texts()
    prompt, _ = trained_ids(tokenizer, template, "", "Add.")
    asked = PromptFormat.of(tokenizer, template).applied_to(tokenizer)
    assert ids_of(asked, [{"role": "user", "content": "Add."}], add_generation_prompt=True) == prompt
    assert tokenizer.convert_ids_to_tokens(prompt)[:2] == ["<s>", "▁"]


def fitted(tmp_path: Path, template: str, **options: Any) -> tuple[CausalLMModule, Path]:
    """A run of one epoch with AdapterExport, and its checkpoint."""
    path = folder_of(tmp_path / "base", "gemma")
    rows = write_examples(tmp_path / "train.jsonl", 4)
    data = SFTDataModule(Files(str(rows)), path, template=template, batch_size=2, **options)
    lm = CausalLMModule(path, max_new_tokens=5)
    callbacks = [MiLoRAInit(r=2), AdapterExport(str(tmp_path / "called"), "merged")]
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks)
    trainer.fit(lm, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    return lm, tmp_path / "a.ckpt"


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_checkpoint_card_and_export_hold_the_template(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = "Now: " if template != "chat" else ""
    lm, checkpoint = fitted(tmp_path, template, prompt_suffix=suffix, max_length=256)
    again = CausalLMModule.load_from_checkpoint(checkpoint, map_location="cpu")
    assert again.prompt_format == lm.prompt_format is not None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    prompt, _ = trained_ids(tokenizer, template, suffix, "What is 1 plus 2?")
    ids = torch.tensor([prompt])
    lm.eval()
    lm.max_new_tokens = 8
    (answer,) = lm.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for format in ("peft", "merged", "called"):
        folder = tmp_path / format
        if format != "called":
            main(["export", "--ckpt_path", str(checkpoint), "--output", str(folder), "--format", format])
        card = (folder / "README.md").read_text()
        assert f"template `{template}`" in card
        monkeypatch.chdir(folder)
        capsys.readouterr()
        code = "".join(re.findall("```python\n(.*?)```", card, re.DOTALL))
        exec(code.replace("max_new_tokens=256", "max_new_tokens=8"), {})  # asks, and stops, as the module does
        assert capsys.readouterr().out == answer + "\n"
        user = [{"role": "user", "content": "What is 1 plus 2?"}]
        assert ids_of(AutoTokenizer.from_pretrained(folder), user, add_generation_prompt=True) == prompt
    ends = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert set(ends) == {1, tokenizer.convert_tokens_to_ids(lm.prompt_format.end_of_turn)}


def test_checkpoints_without_the_record_are_exported_as_before(tmp_path: Path) -> None:
    _, path = fitted(tmp_path, "plain", max_length=64)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["SFTDataModule"]["prompt_format"]
    torch.save(checkpoint, path)
    main(["export", "--ckpt_path", str(path), "--output", str(tmp_path / "peft")])
    assert AutoTokenizer.from_pretrained(tmp_path / "peft").chat_template == TEMPLATES["gemma"][0]
    assert "template" not in (tmp_path / "peft" / "README.md").read_text()


def test_prompts_of_another_format_than_in_training_are_mentioned(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "base", "llama")
    source = Files(str(write_examples(tmp_path / "train.jsonl", 4)))
    plain, alpaca, suffixed = (
        SFTDataModule(source, str(model), template=template, prompt_suffix=suffix)
        for template, suffix in (("plain", ""), ("alpaca", ""), ("plain", "Now: "))
    )
    state = plain.state_dict()
    with pytest.warns(UserWarning, match=r"template='plain', here it is 'alpaca'\. Set data\.template: plain to"):
        alpaca.load_state_dict(state)
    with pytest.warns(UserWarning, match="prompts of another format: prompt_suffix='', here it is 'Now: '"):
        suffixed.load_state_dict(state)


def test_the_template_that_auto_stands_for_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    write_examples(tmp_path / "rows.jsonl", 2)
    for name, template, said in (
        ("chats", "auto", "Template: chat (the tokenizer's own).\n"),
        ("rows", "auto", "Template: alpaca, for prompts and responses.\n"),
        ("rows", "plain", ""),
    ):
        tokenizer = chat_tokenizer("qwen")
        data = SFTDataModule(Files(str(tmp_path / f"{name}.jsonl"), validation_size=0), tokenizer, template=template)
        data.trainer = quiet_trainer(tmp_path)
        capsys.readouterr()
        data.setup("fit")
        data.setup("fit")
        assert "".join(line for line in capsys.readouterr().err.splitlines(True) if "Template" in line) == said


def test_a_module_keeps_the_format_that_its_data_have_given_it(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint with another template asks, and exports, as it trains."""
    tokenizer = tiny_tokenizer()
    mine, theirs = (PromptFormat.of(tokenizer, template) for template in ("plain", "alpaca"))
    lm = CausalLMModule(str(tmp_path))
    checkpoint = {"state_dict": {}, "SFTDataModule": {"prompt_format": theirs.record()}}
    lm.prompt_format = mine
    lm.on_load_checkpoint(checkpoint)
    assert lm.prompt_format == mine
    lm.prompt_format = None
    lm.on_load_checkpoint(checkpoint)
    assert lm.prompt_format == theirs


@pytest.mark.parametrize(("end", "answer"), [("<extra1>", "ab"), ("</s>", "ab<extra1>c")])
def test_an_answer_ends_where_answers_ended_in_training(
    end: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = CausalLMModule(str(save_tiny_model(tmp_path / "llama", "llama")))
    lm.configure_model()
    lm.prompt_format = PromptFormat("plain", "", None, end)
    written = lm.tokenizer("ab<extra1>c</s>d", add_special_tokens=False, return_tensors="pt")["input_ids"]
    monkeypatch.setattr("milora_lightning.module.generate_greedily", lambda *_, **__: written)
    assert lm.generate({"input_ids": written, "attention_mask": torch.ones_like(written)}) == [answer]
