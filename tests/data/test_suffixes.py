"""Which suffix prompts to answer end in, and that there is one prompt for each example."""

from __future__ import annotations

import pytest
from helpers.data_fixtures import InMemory, make_tokenizer, rows

from milora_lightning.data import SFTDataModule
from milora_lightning.data.encoding.prompt_format import PromptFormat


def asking(given: list[tuple[str, str]], **options: str) -> SFTDataModule:
    return SFTDataModule(InMemory(test=given), make_tokenizer(), **options)


@pytest.mark.parametrize(
    ("given", "suffix"),
    [
        ({}, " So:"),
        ({"prompt_suffix": " Mine:"}, " Mine:"),
        ({"generation_prompt_suffix": " Mine:"}, " Mine:"),
        ({"prompt_suffix": " Not asked:", "generation_prompt_suffix": " Mine:"}, " Mine:"),
        ({"prompt_suffix": " Mine:", "template": "plain"}, " Mine:"),
    ],
)
def test_a_suffix_of_the_user_goes_before_those_of_training(given: dict[str, str], suffix: str) -> None:
    data = asking(rows(3), **given)
    data.ask_as(PromptFormat.of(make_tokenizer(), "plain", " Think.", " So:"))
    data.setup("predict")
    assert data.prompt_format is not None
    assert data.prompt_format.asking_suffix == suffix
    assert all(prompt.endswith(suffix) for prompt in data.prompts("test")["prompt"][:])


@pytest.mark.parametrize("answers", [("", "", ""), ("", "2", ""), ("1", "2", "3")])
def test_every_example_without_a_response_has_its_prompt(answers: tuple[str, ...]) -> None:
    questions = ["Question 0", "Question 1", "Question 2"]
    data = asking(list(zip(questions, answers, strict=True)), template="plain", generation_prompt_suffix=" So:")
    data.setup("predict")
    examples, prompts = (part["prompt"][:] for part in (data.examples("test"), data.prompts("test")))
    for question, example, prompt in zip(questions, examples, prompts, strict=True):
        assert question in example
        assert question in prompt
        assert prompt.endswith(" So:")
        assert not example.endswith(" So:")
