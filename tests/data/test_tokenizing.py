from __future__ import annotations

import datasets
import pytest
from helpers.data_fixtures import isolate_cache, make_tokenizer
from transformers import AutoTokenizer

from milora_lightning.data import TEMPLATES, tokenize_dataset
from milora_lightning.data.encoding.templates import ALPACA, TOGETHER, llm_adapters_asked
from milora_lightning.data.sources import cached_dataset
from milora_lightning.data.tokenizing import join


def dataset(*rows: dict[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def some_rows():
    for i in range(5):
        yield {"prompt": f"Add {i}", "input": "", "response": f"{i}", "reference": f"{i}"}


ROW = {"prompt": "Add the numbers.", "response": "The sum is 3."}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds_specials", [True, False])
def test_prompt_and_response_meet_at_the_border(template, adds_specials):
    tokenizer = make_tokenizer(adds_specials=adds_specials)
    example = tokenize_dataset(dataset(ROW), tokenizer, template)[0]
    ids, border = example["input_ids"], example["prompt_length"]
    assert tokenizer.decode(ids[border:]) == "The sum is 3.</s>"
    has_bos = adds_specials or template == "chat"
    assert tokenizer.decode(ids[:border]) == "<s>" * (has_bos and template != "chat") + example["prompt"]
    assert ids.count(tokenizer.bos_token_id) == has_bos
    assert ids[border:].count(tokenizer.eos_token_id) == 1
    assert example["length"] == len(ids)
    assert example["reference"] == ROW["response"]


def test_what_is_generated_from_is_what_was_trained_on():
    # The end of the prompt and the beginning of the response must not merge into one token.
    tokenizer = make_tokenizer()
    long, short = ({**ROW, "response": text} for text in ("task", "t"))
    encoded = tokenize_dataset(dataset(long, short), tokenizer, "plain")
    prompts = [e["input_ids"][: e["prompt_length"]] for e in encoded]
    assert prompts[0] == prompts[1]


def test_alpaca_is_stanfords_prompt():
    text = TEMPLATES["alpaca"]("Say {hello}.", "", make_tokenizer())
    assert text == ALPACA.replace("{prompt}", "Say {hello}.")
    assert text.startswith("Below is an instruction that describes a task. Write a response that appropriately ")
    assert text.endswith("\n\n### Instruction:\nSay {hello}.\n\n### Response:\n")
    assert "### Input:\n1 2\n\n" in TEMPLATES["alpaca"]("Add.", "1 2", make_tokenizer())


@pytest.mark.parametrize("input", ["", "1 2"])
def test_llm_adapters_prompts_are_stanfords_with_other_white_space(input):
    texts = {write("Add.", input) for write in (TEMPLATES["llm-adapters"], llm_adapters_asked)}
    assert len(texts) == 2
    assert all(text.split() == TEMPLATES["alpaca"]("Add.", input).split() for text in texts)


def test_chat_is_the_template_of_the_tokenizer():
    text = TEMPLATES["chat"]("Add.", "1 2", make_tokenizer())
    assert text == "<s><|user|>Add.\n\n1 2</s><|assistant|>"


def test_chat_needs_a_chat_template():
    with pytest.raises(ValueError, match=r"has no chat template\. Use template='alpaca' or 'plain'"):
        tokenize_dataset(dataset(ROW), make_tokenizer(chat_template=None), "chat")


@pytest.mark.parametrize("template", TEMPLATES)
def test_suffix_ends_the_prompt(template):
    example = tokenize_dataset(dataset(ROW), make_tokenizer(), template, prompt_suffix="Step by step.\n")[0]
    assert example["prompt"].endswith("Step by step.\n")
    assert make_tokenizer().decode(example["input_ids"]).endswith("Step by step.\nThe sum is 3.</s>")


def test_input_and_reference_are_used_where_given():
    example = tokenize_dataset(dataset({**ROW, "input": "1 2", "reference": "3"}), make_tokenizer(), "plain")[0]
    assert example["prompt"] == "Add the numbers.\n1 2\n"
    assert example["reference"] == "3"


@pytest.mark.parametrize("max_length", range(2, 12))
@pytest.mark.parametrize("bos", [None, 0])
def test_truncation_keeps_the_response(max_length, bos):
    prompt, response = [0, 11, 12, 13, 14], [21, 22, 23, 24]
    ids, border = join(prompt, response, max_length, bos)
    assert len(ids) == min(max_length, 9)
    assert 1 <= border < len(ids)
    assert ids[border:] == response[: max_length - 1]
    kept = ids[:border]
    if bos is None:
        assert kept == prompt[-border:]
    else:
        assert kept == [bos, *prompt[6 - border :]][:border]


def test_truncation_is_counted():
    rows = [ROW, {**ROW, "prompt": "a " * 200}, {**ROW, "response": "b " * 300}]
    with pytest.warns(UserWarning, match="2 of 3 examples of the test data are longer than max_length=100 tokens"):
        encoded = tokenize_dataset(dataset(*rows), make_tokenizer(), "plain", max_length=100, split="test")
    assert encoded["length"][1:] == [100, 100]
    whole, short_prompt, cut_response = encoded
    end = make_tokenizer().eos_token_id
    assert [e["input_ids"][-1] == end for e in (whole, short_prompt, cut_response)] == [True, True, False]
    assert make_tokenizer().decode(short_prompt["input_ids"]).startswith("<s>")


def test_examples_without_response_are_left_out():
    rows = [ROW, {**ROW, "response": " \n"}, {**ROW, "response": "last"}]
    with pytest.warns(UserWarning, match="1 of 3 examples of the train data have no response: left out"):
        encoded = tokenize_dataset(dataset(*rows), make_tokenizer())
    assert encoded["reference"][:] == ["The sum is 3.", "last"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{**ROW, "response": ""}], {}, "No example of the train data has a response to learn from, of 1: all are"),
        ([ROW], {"max_length": 1}, "max_length=1 leaves no token of any response to learn from. Use 2 at the very"),
        ([{"prompt": "a", "text": "b"}], {}, r"no column 'response', only \['prompt', 'text'\]"),
        ([], {}, "no column 'prompt' and no column 'response'"),
    ],
)
def test_unusable_data_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(dataset(*rows), make_tokenizer(), **options)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="The train data has no rows"):
        tokenize_dataset(dataset(ROW).select([]), make_tokenizer())


def test_tokenizer_without_end_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no EOS token.* Set tokenizer\.eos_token"):
        tokenize_dataset(dataset(ROW), tokenizer)


def test_second_time_comes_from_the_cache(tmp_path, monkeypatch):
    isolate_cache(monkeypatch, tmp_path)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def tokenize(template: str = "plain", use_before: bool = False) -> datasets.Dataset:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        if use_before:  # leaves padding and truncation switched on in the tokenizer
            tokenizer(["a b c", "d"], padding=True, truncation=True, max_length=2)
        return tokenize_dataset(cached_dataset(some_rows), tokenizer, template)

    first = tokenize()
    files = set((tmp_path / "cache").rglob("*.arrow"))
    again = tokenize(use_before=True)
    assert again.cache_files == first.cache_files
    assert set((tmp_path / "cache").rglob("*.arrow")) == files
    assert again[:] == first[:]
    assert tokenize("alpaca").cache_files != first.cache_files  # other arguments, other entry


def test_other_tokenizer_is_not_mistaken_in_the_cache(tmp_path, monkeypatch):
    isolate_cache(monkeypatch, tmp_path)
    first, second = (
        tokenize_dataset(cached_dataset(some_rows), make_tokenizer(adds_specials=adds), "plain") for adds in (0, 1)
    )
    assert second["length"][0] == first["length"][0] + 1


def test_processes_change_nothing(tmp_path, monkeypatch):
    isolate_cache(monkeypatch, tmp_path)
    alone = tokenize_dataset(dataset(*some_rows()), make_tokenizer())
    shared = tokenize_dataset(cached_dataset(some_rows), make_tokenizer(), num_proc=2)
    assert shared[:] == alone[:]


@pytest.mark.parametrize("template", sorted(TOGETHER))
def test_the_border_is_where_the_prompt_by_itself_ends(template):
    """Of templates whose prompt and response are tokenized together, as their authors did."""
    tokenizer = make_tokenizer()
    for response in ("The sum is 3.", "t", " task"):
        example = tokenize_dataset(dataset({**ROW, "response": response}), tokenizer, template)[0]
        alone = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(example["prompt"] + response, add_special_tokens=False)["input_ids"]
        assert example["input_ids"] == [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
        assert example["prompt_length"] == 1 + len(alone)
