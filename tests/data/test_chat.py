"""Chats are trained on as the tokenizer's own chat template writes them, up to the token that ends the turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers.chat_templates import _CHATML, GEMMA, QWEN3, TEMPLATES, chat_tokenizer
from helpers.chats import folder_of, ids_of, render_chat
from transformers import PreTrainedTokenizerBase

from milora_lightning import CausalLMModule
from milora_lightning.data import Instructions, tokenize_dataset
from milora_lightning.data.batches.batching import Collator
from milora_lightning.data.encoding.chat import ChatTemplate, ChatTemplateError
from milora_lightning.data.encoding.prompt_format import PromptFormat

SYSTEM = {"role": "system", "content": "Be kind."}
ANSWERS = ["Hello!", "It is {3}.\n\n#### 3", "  spaces around \n", "\nA line break first", "<b>3</b> ", "Hi<|im_end|>"]


def chat(question: str = "What is 1 + 2?", answer: str = "The sum is 3.") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(*chats: list[dict[str, str]], **columns: list[str]) -> datasets.Dataset:
    texts = {"prompt": [c[-2]["content"] for c in chats], "response": [c[-1]["content"] for c in chats]}
    return datasets.Dataset.from_dict({**texts, **columns})


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_those_of_the_template_token_by_token(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[name][1])
    answers = [answer for answer in ANSWERS if answer != "\nA line break first"]  # see the next test
    chats = [chat(question, answer) for answer in answers for question in ("Hi", " Add\n1 and 2 ")]
    encoded = tokenize_dataset(rows(*chats), tokenizer, "chat")
    batch = Collator(tokenizer.pad_token_id)(list(encoded))
    for messages, example, labels in zip(chats, encoded, batch["labels"], strict=True):
        ids, prompt = ids_of(tokenizer, messages), ids_of(tokenizer, messages[:1], add_generation_prompt=True)
        assert example["input_ids"] == ids
        assert ids[: example["prompt_length"]] == prompt
        assert ids.count(tokenizer.bos_token_id) == (name in ("gemma", "llama3", "mistral"))
        learned = labels[labels != -100].tolist()
        assert learned == ids[len(prompt) :][: len(learned)]
        assert learned[-1] == end  # the end of turn, and nothing behind it
        assert tokenizer.decode(ids[len(prompt) + len(learned) :]).replace("</s>", "").strip() == ""
        assert messages[1]["content"].strip() in tokenizer.decode(learned[:-1])
        assert render_chat(messages, tokenizer) == (ids, [(len(prompt), len(prompt) + len(learned))])


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_generated_from_is_what_was_trained_on(name: str) -> None:
    """No token reaches over the border, though the template's last line break and the answer's first one would join."""
    tokenizer = chat_tokenizer(name)
    tokenizer.add_tokens(["\n\n"])
    messages = chat(answer="\nA line break first")
    ids, ((start, _),) = render_chat(messages, tokenizer)
    assert ids[:start] == ids_of(tokenizer, messages[:1], add_generation_prompt=True)
    assert tokenizer.decode(ids) == tokenizer.decode(ids_of(tokenizer, messages))
    if name == "qwen":  # negative control: the one tokenization of the whole has no such border
        assert ids_of(tokenizer, messages)[:start] != ids[:start]


@pytest.mark.parametrize("name", ["qwen", "llama3", "phi3"])
def test_a_system_message_is_written_where_the_template_takes_one(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    assert render_chat([SYSTEM, *chat()], tokenizer)[0] == ids_of(tokenizer, [SYSTEM, *chat()])


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_system_message_is_the_user_s_where_the_template_takes_none(name: str) -> None:
    """It refuses one (Gemma), or leaves it out without a word."""
    tokenizer = chat_tokenizer(name)
    folded = chat("Be kind.\n\nWhat is 1 + 2?")
    assert render_chat([SYSTEM, *chat()], tokenizer)[0] == ids_of(tokenizer, folded)


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_a_chat_of_a_file_is_the_whole_conversation(name: str, tmp_path: Path) -> None:
    """Its system message too; in other templates that is the instruction, and the question an input to it."""
    messages = [SYSTEM, *chat()]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": chat()}))
    data, tokenizer = Instructions(str(file)).load("train"), chat_tokenizer(name)
    with_system, without = tokenize_dataset(data, tokenizer, "chat")
    expected = messages if name == "qwen" else chat("Be kind.\n\nWhat is 1 + 2?")
    assert with_system["input_ids"] == ids_of(tokenizer, expected)
    assert without["input_ids"] == ids_of(tokenizer, chat())
    assert with_system["instruction"] == "Be kind.\nWhat is 1 + 2?"
    assert "### Input:\nWhat is 1 + 2?" in tokenize_dataset(data, tokenizer, "alpaca")[0]["prompt"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, chat(), "has no chat template. Use template='alpaca' or 'plain'"),
        (
            GEMMA,
            [*chat()[:1], *chat()],
            r"refuses a chat of the roles \['user', 'user', 'assistant'\]: Conv.* alternate",
        ),
        ("{{ messages[9]['content'] | trim }}", chat(), "refuses a chat of the roles .'user'.: .* no element 9"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", chat(), "leaves out the text of the user"),
        # asks with the beginning of thoughts, which an answer does not have
        (
            _CHATML.replace("assistant\n", "assistant\n<think>\n"),
            chat(),
            r"asks for an answer with '<think>\\n', where before an answer that is there it has 'milora answer",
        ),
        # as DeepSeek-R1's: thoughts are not written
        (
            _CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
            chat(answer="<think>a</think>b"),
            "changes the answer",
        ),
        (QWEN3, chat(answer="<think>a</think>b"), None),
    ],
)
def test_a_template_that_would_train_otherwise_than_it_asks_is_refused(
    template: str | None, messages: list[dict[str, str]], message: str | None
) -> None:
    if message is None:
        render_chat(messages, chat_tokenizer(template))
        return
    with pytest.raises(ChatTemplateError, match=message):
        render_chat(messages, chat_tokenizer(template))


def test_a_refused_row_is_named() -> None:
    tokenizer = chat_tokenizer(
        _CHATML + "{% if 'x' in messages[0]['content'] %}{{ raise_exception('no x') }}{% endif %}"
    )
    with pytest.raises(ValueError, match=r"^In row 2 of the test data \('x\?'\), the chat template .* no x\."):
        tokenize_dataset(rows(chat(), chat("x?")), tokenizer, "chat", split="test")


def test_a_template_without_an_end_of_turn_gets_the_end_of_text() -> None:
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.warns(
        UserWarning, match="ends the assistant's turn with no special token: the EOS token '</s>' is put"
    ):
        (example,) = tokenize_dataset(rows(chat()), tokenizer, "chat")
    assert example["input_ids"] == [*ids_of(tokenizer, chat()), tokenizer.eos_token_id]
    assert example["response_end"] == example["length"]


def test_no_eos_token_is_needed_where_the_template_ends_turns() -> None:
    tokenizer = chat_tokenizer("qwen")
    tokenizer.eos_token = None
    (example,) = tokenize_dataset(rows(chat()), tokenizer, "chat")
    assert example["input_ids"] == ids_of(tokenizer, chat())


@pytest.mark.parametrize("name", ["qwen", "gemma", "llama3"])
def test_too_long_questions_lose_their_beginning_and_not_the_template(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    long = chat("first " + "word " * 200 + "last?")
    whole = ids_of(tokenizer, long)
    with pytest.warns(UserWarning, match="truncated"):
        (example,) = tokenize_dataset(rows(long), tokenizer, "chat", max_length=300)
    text = tokenizer.decode(example["input_ids"])
    before, after = tokenizer.decode(whole).split("first ")[0], tokenizer.decode(whole).split("last?")[1]
    assert text.startswith(before)
    assert text.endswith("last?" + after)
    assert "first" not in text
    assert len(example["input_ids"]) == 300


def test_suffix_begins_the_answer() -> None:
    tokenizer = chat_tokenizer("qwen")
    (example,) = tokenize_dataset(rows(chat()), tokenizer, "chat", prompt_suffix="Step by step: ")
    ids, border = example["input_ids"], example["prompt_length"]
    assert ids == ids_of(tokenizer, chat(answer="Step by step: The sum is 3."))
    assert tokenizer.decode(ids[border : example["response_end"]]) == "The sum is 3.<|im_end|>"
    with pytest.raises(ChatTemplateError, match=r"prompt_suffix='Step by step: ' included"):
        ChatTemplate.of(chat_tokenizer("qwen3")).write(chat(), "Step by step: ")


@pytest.mark.parametrize("name", TEMPLATES)
def test_choices_are_the_answers_that_would_be_trained_on(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    template = ChatTemplate.of(tokenizer)
    prompt, _ = template.write(chat())
    for answer, ids in zip(("true", "false"), template.respond(prompt, ["true", "false"]), strict=True):
        whole, ((start, stop),) = render_chat(chat(answer=answer), tokenizer)
        assert ids == whole[start:stop]


def test_labels_of_a_batch_end_with_the_turn() -> None:
    tokenizer = chat_tokenizer("phi3")
    encoded = tokenize_dataset(rows(chat(), chat(answer="3")), tokenizer, "chat")
    labels = Collator(tokenizer.pad_token_id)(list(encoded))["labels"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert [row[row != -100][-1].item() for row in labels] == [end, end]
    assert torch.equal((labels == end).sum(1), torch.ones(2, dtype=torch.int64))


def scripted(module: CausalLMModule, script: list[int]) -> list[int]:
    """Have the model say some tokens, whatever it reads; returns a list that grows with every forward."""
    forward, calls = module.model.forward, []

    def saying(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits[:] = -1.0
        out.logits[..., script[len(calls)]] = 1.0
        calls.append(1)
        return out

    module.model.forward = saying
    return calls


def built(path: str, prompt_format: PromptFormat | None = None, tokens: int = 6) -> CausalLMModule:
    module = CausalLMModule(path, max_new_tokens=tokens)
    module.configure_model()
    module.eval()
    module.prompt_format = prompt_format
    return module


def batch_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    ids = torch.tensor([ids_of(tokenizer, chat()[:1], add_generation_prompt=True)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", ["gemma", "llama3", "phi3", "qwen"])
def test_answers_end_with_the_turn(name: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path, name)
    tokenizer = chat_tokenizer(name)
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[name][1])
    script = [*tokenizer("Yes", add_special_tokens=False)["input_ids"], end, *[40] * 9]
    said = script.index(end) + 1
    module = built(path, PromptFormat.of(tokenizer, "chat"), tokens=8)
    calls = scripted(module, script)
    assert module.generate(batch_of(tokenizer)) == ["Yes"]
    assert len(calls) == said
    # negative control: of EOS alone the model goes on
    module = built(path, tokens=8)
    calls = scripted(module, script)
    assert module.generate(batch_of(tokenizer)) != ["Yes"]
    assert len(calls) == 8


@pytest.mark.parametrize("ends", [33, [33], [1, 33]])
def test_answers_end_at_every_end_of_the_model(ends: int | list[int], tmp_path: Path) -> None:
    module = built(folder_of(tmp_path, "qwen", eos_token_id=ends))
    calls = scripted(module, [40, 33, *[40] * 9])
    (answer,) = module.generate(batch_of(module.tokenizer))
    assert (answer, len(calls)) == (module.tokenizer.decode([40]), 2)


def test_answers_are_greedy_whatever_the_model_ships(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: Any
) -> None:
    """Without sampling, penalties or lengths of its own, and without what transformers says of these."""
    shipped = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 9.0, "max_length": 4096}
    plain, loaded = (built(folder_of(tmp_path / name, "qwen")) for name in "ab")
    for option, value in shipped.items():
        setattr(loaded.model.generation_config, option, value)
    loaded.model.load_state_dict(plain.model.state_dict())
    batch = batch_of(plain.tokenizer)
    assert loaded.generate(batch) == plain.generate(batch)
    assert loaded.model.generation_config.temperature == 0.6  # as it was
    assert not [w for w in recwarn if "generat" in str(w.message)]
    assert not caplog.records
    loaded.model.generation_config.suppress_tokens = [40]  # what the model must not say stays
    scripted(loaded, [40] * 9)
    assert loaded.tokenizer.decode([40]) not in loaded.generate(batch)[0]
