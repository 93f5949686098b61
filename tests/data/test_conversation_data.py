"""Rows of all kinds become examples: conversations in any template, plain texts in pieces, prompts as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat_templates import CHATML, QWEN3_STRIPS, chat_tokenizer
from helpers.chats import folder_of, ids_of
from helpers.conversations import LONG, TALK, TOOL, with_calls
from helpers.data_fixtures import make_tokenizer
from helpers.models import quiet_trainer

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule
from milora_lightning.data import Collator, Files, tokenize_dataset
from milora_lightning.data.encoding.prompt_format import PromptFormat

PAIR = {"prompt": "Add.", "response": "3"}


class Rows:
    """A source of rows that are given."""

    def __init__(self, train: list[dict[str, Any]], validation: list[dict[str, Any]] | None = None) -> None:
        self.splits = {"train": train, "validation": validation}

    def load(self, split: str) -> list[dict[str, Any]] | None:
        return self.splits.get(split)


def learned(tokenizer: Any, example: dict[str, Any]) -> list[str]:
    labels = Collator(0)([example])["labels"][0]
    return tokenizer.decode(labels[labels != -100])


def test_auto_writes_conversations_as_the_tokenizer_does() -> None:
    tokenizer = chat_tokenizer("qwen")
    talk, calls = tokenize_dataset([{"messages": TALK}, {"messages": with_calls({"a": 1})[:1] + TALK[2:3]}], tokenizer)
    assert talk["input_ids"] == ids_of(tokenizer, TALK)
    assert learned(tokenizer, talk) == "Hello!<|im_end|>It is 3.<|im_end|>"
    assert talk["reference"] == "It is 3."
    assert calls["response_end"] == calls["spans"][-1]
    pair, talk = tokenize_dataset([PAIR, {"messages": TALK}], tokenizer)  # one template for all
    assert pair["input_ids"] == ids_of(tokenizer, [{"role": "user", "content": "Add."}, TALK[2] | {"content": "3"}])
    assert talk["input_ids"] == ids_of(tokenizer, TALK)


@pytest.mark.parametrize("suffix", ["", "So: "])
@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_templates_of_prompts_write_several_turns(template: str, suffix: str) -> None:
    """As the chat template that exports get does, and the first turn as a row of a prompt and a response."""
    tokenizer = make_tokenizer()
    served = PromptFormat.of(tokenizer, template, suffix).applied_to(tokenizer)
    (example,) = tokenize_dataset([{"messages": TALK}], tokenizer, template, suffix)
    assert example["input_ids"] == ids_of(served, TALK)
    assert learned(tokenizer, example) == "Hello!</s>It is 3.</s>"
    asked = ids_of(served, TALK[:-1], add_generation_prompt=True)
    assert example["input_ids"][: example["prompt_length"]] == asked
    _, talk = tokenize_dataset([PAIR, {"messages": TALK[1:3]}], tokenizer, template, suffix)
    (same,) = tokenize_dataset([{"prompt": "Hi", "response": "Hello!"}], tokenizer, template, suffix)
    assert talk["input_ids"] == same["input_ids"]
    assert talk["spans"] == same["spans"]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        (with_calls({"a": 1}), "a message of the role 'tool' there"),
        ([*TALK[:3], TALK[0], *TALK[3:]], None),
        ([*TALK, TALK[0]], "a message of the role 'system' there"),
        ([TALK[0], *TALK[2:]], "a message of the role 'system' there"),
        (TALK, "tools"),
    ],
)
def test_templates_of_prompts_have_no_place_for_some_messages(messages: list[Any], what: str | None) -> None:
    """For tools, and for a system message without a question after it."""
    row = {"messages": messages, "tools": [TOOL] if what and "system" not in what else None}
    if what is None:
        assert len(tokenize_dataset([PAIR, row], make_tokenizer(), "alpaca")) == 2
        return
    with pytest.raises(ValueError, match=rf"In row 2 of the train data, .* no place for {what}\. Use template='chat'"):
        tokenize_dataset([PAIR, row], make_tokenizer(), "alpaca")


def test_every_turn_of_a_conversation_begins_with_the_suffix_which_is_not_learned() -> None:
    tokenizer = chat_tokenizer("qwen")
    (example,) = tokenize_dataset([{"messages": TALK}], tokenizer, "chat", prompt_suffix="So: ")
    begun = [{**m, "content": "So: " + m["content"]} if m["role"] == "assistant" else m for m in TALK]
    assert example["input_ids"] == ids_of(tokenizer, begun)
    assert learned(tokenizer, example) == "Hello!<|im_end|>It is 3.<|im_end|>"


def test_questions_can_be_learned_without_any_answer() -> None:
    """For a model that plays the user."""
    tokenizer = chat_tokenizer(CHATML)
    rows = [{"messages": [{**TALK[1], "train": True}]}, {"messages": TALK}]
    example, _ = tokenize_dataset(rows, tokenizer)
    assert learned(tokenizer, example) == "Hi<|im_end|>"
    assert example["input_ids"] == ids_of(tokenizer, TALK[1:2])


def test_a_jinja_file_is_a_template(tmp_path: Path) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    bare, own = chat_tokenizer(None), chat_tokenizer(CHATML)
    (example,) = tokenize_dataset([{"messages": TALK}], bare, str(file))
    assert example["input_ids"] == ids_of(own, TALK)
    data = SFTDataModule(Rows([PAIR]), bare, str(file))
    assert data.prompt_format == PromptFormat.of(own, "chat")
    assert bare.chat_template is None
    with pytest.raises(ValueError, match=r"There is no template 'chatlm': auto, .*vicuna are known, and the path"):
        SFTDataModule(Rows([PAIR]), bare, "chatlm")
    with pytest.raises(ValueError, match="has no chat template"):
        tokenize_dataset([{"messages": TALK}], bare)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("length", [1, 6, 7, 8, 13, 20])
def test_texts_are_cut_into_pieces_and_no_token_is_lost(length: int, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_specials=adds_bos)
    text = "".join("abcdefghijklmnopqrst"[:length])
    ids = [1] * adds_bos + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids[: int(adds_bos)] = [tokenizer.bos_token_id] * adds_bos
    pieces = list(tokenize_dataset([{"text": text}], tokenizer, max_length=8))
    assert [token for piece in pieces for token in piece["input_ids"]] == ids
    assert all(2 <= piece["length"] <= 8 for piece in pieces)
    for piece in pieces:
        assert piece["spans"] == [0, piece["length"]]
        assert Collator(0, 1)([piece])["labels"][0].tolist() == piece["input_ids"]


def test_what_became_of_the_rows_is_said(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = chat_tokenizer(QWEN3_STRIPS)
    rows = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": LONG}, {"text": "word " * 200}, {"text": "word"}]
    encoded = tokenize_dataset(rows, tokenizer, max_length=200)
    said = " ".join(str(warning.message) for warning in recwarn)
    pieces = len(encoded) - 3  # beside two conversations and the short text
    assert "1 of 5 examples of the train data have no response: left out" in said
    assert f"1 of {len(encoded)} examples of the train data are longer than max_length=200 tokens" in said
    assert f"1 text of the train data longer than max_length=200 tokens: cut into {pieces} pieces" in said
    assert pieces > 1
    assert "answers in 2 conversations of the train data otherwise once others follow" in said


def test_train_on_and_fields_reach_the_labels() -> None:
    tokenizer = chat_tokenizer("qwen")
    (example,) = tokenize_dataset([{"messages": TALK}], tokenizer, train_on="last")
    assert learned(tokenizer, example) == "It is 3.<|im_end|>"
    weighted = [{**m, "weight": int(m["content"] == "Hello!")} if m["role"] == "assistant" else m for m in TALK]
    (example,) = tokenize_dataset([{"messages": weighted}], tokenizer)
    assert learned(tokenizer, example) == "Hello!<|im_end|>"


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_a_run_on_conversations_or_texts(kind: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "base", "qwen")
    row = {"messages": TALK} if kind == "messages" else {"text": "What is 1 plus 2? It is 3."}
    data = SFTDataModule(Rows([row] * 4, [row] * 2), path, batch_size=2, max_length=128)
    lm = CausalLMModule(path, max_new_tokens=3)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[MiLoRAInit(r=2)])
    trainer.fit(lm, data)
    assert torch.isfinite(trainer.callback_metrics["val_loss"])
    assert ("val_accuracy" in trainer.callback_metrics) == (kind == "messages")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = CausalLMModule.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
    if kind == "messages":
        assert again.prompt_format == PromptFormat.of(chat_tokenizer("qwen"), "chat")
        prompts = next(iter(data.val_dataloader()[1]))
        ids = ids_of(chat_tokenizer("qwen"), TALK[:-1], add_generation_prompt=True)[-40:]
        assert prompts["input_ids"][0, -40:].tolist() == ids
    else:
        assert again.prompt_format is None


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_predict_answers_conversations_that_end_in_a_question(template: str, tmp_path: Path) -> None:
    """What is asked is what the template asks with, and of an evaluation they are left out as before."""
    user, assistant = ({"role": role, "content": "{}"} for role in ("user", "assistant"))
    talks = [
        [{**user, "content": "Hi?"}, {**assistant, "content": "Hello."}, {**user, "content": "How are you?"}],
        [{**user, "content": "Alone?"}],
        [{**user, "content": "One?"}, {**assistant, "content": "Two."}],
        [{**user, "content": "First?"}, {**assistant, "content": "No."}, {**user, "content": "word " * 99}],
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    tokenizer = make_tokenizer()
    data = SFTDataModule(Files(test=str(tmp_path / "a.jsonl")), tokenizer, template=template, max_length=64)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    asked = [
        ids[mask > 0].tolist() for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    asks = data.prompt_format.applied_to(tokenizer)
    for ids, talk in zip(asked[:3], [talks[0], talks[1], talks[2][:1]], strict=True):
        assert ids == asks.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert len(asked[3]) < 64  # what is too long loses its beginning, and no less is asked
    assert tokenizer.decode(asked[3]).rstrip().endswith("<|assistant|>" if template == "chat" else "word")
    assert [reference for b in batches for reference in b["reference"]] == ["", "", "Two.", ""]
    data.setup("test")
    assert data.examples("test")["reference"][:] == ["Hello.", "Two.", "No."]


def test_predict_answers_each_line_of_a_text_and_evaluations_read_it_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("What is 1?\n\nWhat is 2?\n")
    data = SFTDataModule(Files(test=str(tmp_path / "a.txt")), make_tokenizer(), template="plain")
    for stage, texts in (("test", 1), ("predict", 2), ("test", 1), ("predict", 2)):
        data.setup(stage)
        assert len(data.examples("test")) == texts
    (batch,) = data.predict_dataloader()
    assert batch["instruction"] == ["What is 1?", "What is 2?"]
