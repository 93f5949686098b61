"""Conversations are written as their template writes them, token by token, and their turns are learned to the token."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from helpers.chat_templates import (
    CHATML,
    MARKED,
    MARKED_WITHOUT_END,
    QWEN3_STRIPS,
    QWEN25_TOOLS,
    TEMPLATES,
    chat_tokenizer,
)
from helpers.chats import ids_of
from helpers.conversations import LONG, SYSTEM, TALK, TOOL, Messages, assistant, call, user, with_calls
from transformers import PreTrainedTokenizerBase

from milora_lightning.data.encoding.chat import ChatTemplate, ChatTemplateError, fold_system
from milora_lightning.data.encoding.token_borders import locate, locate_all
from milora_lightning.data.encoding.turn_encoding import EncodedConversation, choose_turns, encode_conversation
from milora_lightning.data.encoding.turns import write_conversation


def encoded(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    train_on: Any = "assistant",
    tools: Any = "",
    max_length: int = 4096,
    prefill: str = "",
) -> EncodedConversation:
    conversation = choose_turns(json.dumps(messages), tools, train_on)
    result = encode_conversation(conversation, ChatTemplate.of(tokenizer), max_length, prefill)
    assert result is not None
    assert all(a < b for a, b in result.spans)
    return result


def parts(tokenizer: PreTrainedTokenizerBase, example: EncodedConversation) -> list[str]:
    """The texts outside of and in the spans, by turns."""
    borders = [0, *(border for span in example.spans for border in span), len(example.ids)]
    return [tokenizer.decode(example.ids[a:b]) for a, b in pairwise(borders)]


CHATML_PARTS = [
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "Hello!<|im_end|>",
    "\n<|im_start|>user\nWhat is\n1 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "It is 3.<|im_end|>",
    "\n",
]
THOUGHT = "<think>\n\n</think>\n\n"
BY_HAND = {
    "qwen": CHATML_PARTS,
    "smollm2": CHATML_PARTS,
    "qwen3": [*CHATML_PARTS[:1], THOUGHT + CHATML_PARTS[1], CHATML_PARTS[2], THOUGHT + CHATML_PARTS[3], "\n"],
    "gemma": [
        "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
        "Hello!<end_of_turn>",
        "\n<start_of_turn>user\nWhat is\n1 + 2?<end_of_turn>\n<start_of_turn>model\n",
        "It is 3.<end_of_turn>",
        "\n",
    ],
    "llama3": [
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Hello!<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is\n1 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "It is 3.<|eot_id|>",
        "",
    ],
    "mistral": [
        "<s>[INST] Be kind.\n\nHi [/INST]",
        " Hello!</s>",
        "[INST] What is\n1 + 2? [/INST]",
        " It is 3.</s>",
        "",
    ],
    "phi3": [
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n",
        "Hello!<|end|>",
        "\n<|user|>\nWhat is\n1 + 2?<|end|>\n<|assistant|>\n",
        "It is 3.<|end|>",
        "\n</s>",
    ],
    CHATML: CHATML_PARTS,
    MARKED: CHATML_PARTS,
    MARKED_WITHOUT_END: CHATML_PARTS,
}


@pytest.mark.parametrize("name", BY_HAND, ids=[*TEMPLATES, "chatml", "marked", "marked-without-end"])
def test_all_turns_of_the_assistant_are_learned(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    takes_system = ChatTemplate.of(tokenizer).takes_system
    example = encoded(tokenizer, TALK)
    assert example.ids == ids_of(tokenizer, TALK if takes_system else fold_system(TALK))
    assert parts(tokenizer, example) == BY_HAND[name]
    prompt = tokenizer.decode(example.ids[: example.prompt_length])
    assert prompt == example.prompt == "".join(BY_HAND[name][:3])
    assert (example.instruction, example.reference) == ("Be kind.\nHi\nHello!\nWhat is\n1 + 2?", "It is 3.")
    asked = (TALK if takes_system else fold_system(TALK))[:-1]
    assert example.ids[: example.prompt_length] == ids_of(tokenizer, asked, add_generation_prompt=True)


def test_marks_are_those_of_transformers() -> None:
    tokenizer = chat_tokenizer(MARKED)
    mask = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)["assistant_masks"]
    example = encoded(tokenizer, TALK)
    assert [i for i, learn in enumerate(mask) if learn] == [i for a, b in example.spans for i in range(a, b)]


@pytest.mark.parametrize(
    ("train_on", "messages", "learned"),
    [
        ("last", TALK, ["It is 3."]),
        (["user", "assistant"], TALK, ["Hi", "Hello!", "What is\n1 + 2?", "It is 3."]),
        (["system"], TALK, ["Be kind."]),
        ("assistant", [user(), assistant(weight=0), user("b"), assistant("B")], ["B"]),
        ("assistant", [user(), assistant(), user("b"), assistant("B", train=False)], ["Hello!"]),
        ("last", [user(), assistant(loss=True), user("b"), assistant("B")], ["Hello!", "B"]),
        ("assistant", [user("assistant", weight=1), assistant(), user("the end")], ["assistant", "Hello!"]),
    ],
)
@pytest.mark.parametrize("name", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_roles_and_fields_choose_turns(name: str, train_on: Any, messages: Messages, learned: list[str]) -> None:
    tokenizer = chat_tokenizer(name)
    example = encoded(tokenizer, messages, train_on)
    assert example.ids == ids_of(tokenizer, messages)
    assert parts(tokenizer, example)[1::2] == [text + "<|im_end|>" for text in learned]


def test_questions_are_learned_where_roles_have_to_alternate() -> None:
    tokenizer = chat_tokenizer("gemma")
    messages = [user("a"), assistant("A"), user("b"), assistant("B"), user("c"), assistant("C")]
    learned = parts(tokenizer, encoded(tokenizer, messages, ["user", "assistant"]))[1::2]
    assert learned == [f"{text}<end_of_turn>" for text in "aAbBcC"]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (assistant(weight=0.5), "message 2 has weight=0.5, but a message is learned or not: give 0 or 1"),
        (assistant(weight=1, train=False), "which contradict each other about whether to learn it"),
        ("Hello!", "message 2 is 'Hello!', but has to be an object with role and content"),
    ],
)
def test_a_field_that_says_neither_is_refused(message: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        choose_turns([user(), message], "")


def test_nothing_to_learn_is_none() -> None:
    for messages in ([user()], [user(), assistant(weight=0)]):
        template = ChatTemplate.of(chat_tokenizer("qwen"))
        assert encode_conversation(choose_turns(messages, ""), template, 100) is None


@pytest.mark.parametrize("arguments", [{"a": 1, "b": 2}, '{"a": 1, "b": 2}'])
def test_tools_and_calls_pass_through_the_template(arguments: Any) -> None:
    tokenizer = chat_tokenizer(QWEN25_TOOLS)
    messages = with_calls({"a": 1, "b": 2})
    example = encoded(tokenizer, with_calls(arguments), tools=json.dumps([TOOL]))
    assert example.ids == ids_of(tokenizer, messages, tools=[TOOL])
    assert parts(tokenizer, example)[1::2] == [
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>',
        "It is 3.<|im_end|>",
    ]
    last = encoded(tokenizer, with_calls(arguments)[:2], tools=[TOOL])
    assert last.reference == '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def test_a_template_that_takes_arguments_as_text_gets_them_so() -> None:
    jinja = QWEN25_TOOLS.replace("(call['function']['arguments'] | tojson)", "call['function']['arguments']")
    tokenizer = chat_tokenizer(jinja)
    messages = with_calls('{"a":  1}')
    example = encoded(tokenizer, messages, tools=[TOOL])
    assert example.ids == ids_of(tokenizer, messages, tools=[TOOL])
    assert '"arguments": {"a":  1}}' in parts(tokenizer, example)[1]


@pytest.mark.parametrize("rest", [[], [user(), assistant("It is 3.")]], ids=["alone", "followed"])
def test_a_conversation_may_begin_with_the_assistant(rest: Messages) -> None:
    """As many in ShareGPT do."""
    tokenizer = chat_tokenizer(CHATML)
    messages = [assistant("Hello! How can I help?"), *rest]
    example = encoded(tokenizer, messages)
    assert example.ids == ids_of(tokenizer, messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert parts(tokenizer, example)[1::2] == [f"{answer}<|im_end|>" for answer in answers]


WITHOUT_CALLS = QWEN25_TOOLS.replace("in m['tool_calls'] or []", "in []")
WITHOUT_ARGUMENTS = QWEN25_TOOLS.replace("(call['function']['arguments'] | tojson)", "'{}'")
THINKS_IF_ASKED = CHATML.replace("assistant\n'", "assistant\n' + '<think>\n' * ('/think' in messages[-1]['content'])")
FIRST_CALL = QWEN25_TOOLS.replace("in m['tool_calls'] or []", "in (m['tool_calls'] or [])[:1]")


@pytest.mark.parametrize(
    ("template", "messages", "tools", "problem"),
    [
        (CHATML, [user(), assistant("a", tool_calls=[call({})])], "", "leaves out the tool calls of message 2"),
        # though the function's name is in the text, among the tools
        (WITHOUT_CALLS, with_calls({"a": 1}), [TOOL], "leaves out the tool calls of message 2"),
        (WITHOUT_ARGUMENTS, with_calls({"a": 1}), [TOOL], "leaves out the tool calls of message 2"),
        (FIRST_CALL, [user(), assistant("", tool_calls=[call({}), call({"b": 1})])], [TOOL], "the tool calls of mess"),
        (CHATML, [user(), assistant()], [TOOL], "leaves out the tools"),
        ("mistral", [user(), assistant(), {"role": "tool", "content": "7"}, assistant("b")], "", "of the role 'tool'"),
        (CHATML, [user(), assistant("a", reasoning_content="because")], "", "does not write message 2 as it is"),
        ("gemma", [user(), user(), assistant()], "", "refuses a chat of the roles"),
        # asks with the beginning of thoughts, which an answer does not have: no prefix is a prompt
        (CHATML.replace("assistant\n'", "assistant\n<think>\n'"), TALK, "", "asks for an answer with"),
        # and where a template that asks so for some questions alone meets one of them
        (THINKS_IF_ASKED, [user(), assistant(), user("b /think"), assistant("B")], "", "asks for an answer with"),
        # marks one turn, whatever there are
        (MARKED.replace("m['role'] == 'assistant'", "loop.last"), TALK, "", "marks 1 passages as generated, of a conv"),
    ],
)
def test_what_would_be_lost_or_learned_otherwise_is_refused(
    template: str, messages: Messages, tools: Any, problem: str
) -> None:
    with pytest.raises(ChatTemplateError, match=problem):
        encoded(chat_tokenizer(template), messages, tools=tools)


def test_turns_that_the_template_writes_otherwise_later_are_not_learned() -> None:
    tokenizer = chat_tokenizer(QWEN3_STRIPS)
    example = encoded(tokenizer, TALK)
    assert example.ids == ids_of(tokenizer, TALK)
    assert example.unlearned == 1
    assert parts(tokenizer, example)[1::2] == ["<think>\n\n</think>\n\nIt is 3.<|im_end|>"]
    # a call and the answer to its result are both after the last question
    rounds = [user(), assistant("<think>a</think>b"), {"role": "tool", "content": "x"}, assistant("<think>c</think>d")]
    example = encoded(tokenizer, rounds)
    assert example.unlearned == 0
    assert parts(tokenizer, example)[1::2] == [f"<think>\n{a}\n</think>\n\n{b}<|im_end|>" for a, b in ("ab", "cd")]
    # what follows the last answer would take its thoughts away
    example = encoded(tokenizer, [*TALK, user("Thanks!")])
    assert example.ids == ids_of(tokenizer, TALK)


def test_a_beginning_that_hangs_on_the_rest_leaves_the_last_turn() -> None:
    tokenizer = chat_tokenizer("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}" + CHATML)
    example = encoded(tokenizer, TALK)
    assert (example.ids, example.unlearned) == (ids_of(tokenizer, TALK), 1)
    assert parts(tokenizer, example)[1::2] == ["It is 3.<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen", "gemma", "mistral"])
def test_tokens_do_not_reach_over_a_border(name: str) -> None:
    """Each turn begins with a line break, which would join the one before it."""
    tokenizer = chat_tokenizer(name)
    tokenizer.add_tokens(["\n\n"])
    messages = [user(), assistant("\nA"), user("b"), assistant("\nB")]
    example = encoded(tokenizer, messages)
    assert tokenizer.decode(example.ids) == tokenizer.decode(ids_of(tokenizer, messages))
    ends = {"qwen": "<|im_end|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
    if name != "gemma":  # which takes white space off
        lead = " " * (name == "mistral")
        assert parts(tokenizer, example)[1::2] == [f"{lead}\n{text}{ends[name]}" for text in "AB"]
    # negative control: the one tokenization of the whole has no such borders
    assert (example.ids == ids_of(tokenizer, messages)) == (name != "qwen")


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_tokenization_of_many_texts_is_that_of_each(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    plain = write_conversation(choose_turns(TALK, ""), ChatTemplate.of(tokenizer))
    tokenizer.add_tokens(["\n\n"])
    joining = [user(), assistant("\nA"), user("b"), assistant("\nB")]
    written = [plain, write_conversation(choose_turns(joining, ""), ChatTemplate.of(tokenizer))]
    together = locate_all([w.text for w in written], [w.borders() for w in written], tokenizer)
    assert together[0] == locate(plain.text, plain.borders(), tokenizer)
    assert (together[1] is None) == (name in ("qwen", "smollm2", "phi3"))


def test_a_prefill_is_a_part_of_every_prompt() -> None:
    tokenizer = chat_tokenizer("qwen")
    example = encoded(tokenizer, TALK, prefill="So: ")
    assert example.ids == ids_of(tokenizer, [*TALK[:2], assistant("So: Hello!"), TALK[3], assistant("So: It is 3.")])
    assert parts(tokenizer, example)[1::2] == ["Hello!<|im_end|>", "It is 3.<|im_end|>"]
    assert example.prompt.endswith("assistant\nSo: ")


@pytest.mark.parametrize("name", ["qwen", "gemma", QWEN3_STRIPS], ids=["qwen", "gemma", "strips"])
@pytest.mark.parametrize("max_length", [150, 300, 500])
def test_long_conversations_lose_their_earliest_exchanges(name: str, max_length: int) -> None:
    tokenizer = chat_tokenizer(name)
    example = encoded(tokenizer, LONG, max_length=max_length)
    assert example.truncated
    takes_system = ChatTemplate.of(tokenizer).takes_system
    wholes = []
    for dropped in range(1, 8):
        kept = [SYSTEM, *LONG[1 + 2 * dropped :]]
        wholes.append(ids_of(tokenizer, kept if takes_system else fold_system(kept)))
    assert example.ids == next(ids for ids in wholes if len(ids) <= max_length)
    assert tokenizer.decode(example.ids).count("Be kind.") == 1


def test_what_is_learned_stays_in_long_conversations() -> None:
    """Turns behind the last one to learn go first."""
    tokenizer = chat_tokenizer("qwen")
    messages = [{**m, "weight": int(m["content"] == "answer 3")} for m in LONG]
    example = encoded(tokenizer, messages, max_length=200)
    assert parts(tokenizer, example)[1::2] == ["answer 3<|im_end|>"]
    assert "question 2" in tokenizer.decode(example.ids)
    assert "question 4" not in tokenizer.decode(example.ids)


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_an_exchange_too_long_by_itself_is_cut(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    long = [*TALK[:3], user("first " + "word " * 200 + "last?"), assistant("It is 3.")]
    example = encoded(tokenizer, long, max_length=200)
    assert len(example.ids) == 200
    text = tokenizer.decode(example.ids)
    assert "first" not in text
    assert "last?" in text
    assert parts(tokenizer, example)[1].startswith("It is 3.<")
    example = encoded(tokenizer, [user(), assistant("word " * 300)], max_length=100)
    assert (len(example.ids), example.spans[-1].stop) == (100, 100)
