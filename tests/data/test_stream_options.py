"""Options that change how examples are encoded do the same to a stream as to the data at once."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.data_fixtures import isolate_cache, make_tokenizer

from milora_lightning.data import Files, SFTDataModule

pytestmark = pytest.mark.filterwarnings("ignore:12 of 12 examples of the .* are longer than max_length")
ROWS = 12


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)


def written(folder: Path, kind: str) -> str:
    """Prompts with responses, or conversations with two questions each."""
    records: list[dict[str, Any]] = []
    for i in range(ROWS):
        question, answer = f"What is {i}?" + " Well?" * (i * 7 % 5), f"It is {i}."
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append({"prompt": question, "completion": answer} if kind == "prompts" else {"messages": 2 * turn})
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def examples(path: str, streaming: bool, **options: Any) -> Counter[tuple[Any, ...]]:
    """Token ids and labels of all examples."""
    source, settings = Files(path, validation_size=0), {"batch_size": 1, "pad_to_multiple_of": 1, **options}
    data = SFTDataModule(source, make_tokenizer(), streaming=streaming, shuffle_buffer=ROWS, **settings)
    data.setup("fit")
    batches = itertools.islice(data.train_dataloader(), ROWS)  # of a stream, which has no end, once all of it
    return Counter((tuple(b["input_ids"][0].tolist()), tuple(b["labels"][0].tolist())) for b in batches)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prompts", {"train_on_inputs": True}),
        ("prompts", {"prompt_suffix": " So: "}),
        ("prompts", {"template": "plain"}),
        ("prompts", {"template": "chat"}),
        ("prompts", {"max_length": 70}),
        ("conversations", {"train_on": "last"}),
        ("conversations", {"train_on": ["user"]}),
        ("conversations", {"max_length": 30}),
    ],
    ids=str,
)
def test_a_stream_is_encoded_as_the_data_at_once(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    at_once = examples(path, False, **options)
    assert at_once.total() == ROWS
    assert examples(path, True, **options) == at_once
    assert examples(path, True) != at_once  # where the option is left out
