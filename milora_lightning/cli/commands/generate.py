"""``generate``: answers prompts from the command line, a file or a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, cast

import torch
from lightning.pytorch import seed_everything
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.adapters.contexts import adapters_merged
from milora_lightning.cli.commands.loading import load_to_ask
from milora_lightning.cli.commands.prompts import conversation, read_prompts, tools_of
from milora_lightning.data.encoding.asking import padded, prompt_ids, room
from milora_lightning.models.generation import (
    Sampling,
    cut_at_stop,
    generate_greedily,
    greedy_config,
    use_generation_config,
)
from milora_lightning.models.processor import DtypeName
from milora_lightning.utils.counting import counted
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError
from milora_lightning.utils.folders import check_file
from milora_lightning.utils.messages import inform
from milora_lightning.utils.printable import printable

WINDOW = 16  # number of batches within which prompts are sorted by length, before their answers are written


def generate(
    ckpt_path: str | None = None,
    model: str | None = None,
    prompt: str | None = None,
    input: str | None = None,
    output: str | None = None,
    format: Literal["auto", "text", "jsonl"] = "auto",
    system: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_return_sequences: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    template: str | None = None,
    name_or_path: str | None = None,
    dtype: DtypeName | None = None,
    device: str | None = None,
) -> None:
    """Answer prompts with the prompt template of the model's training.

    Args:
        ckpt_path: Checkpoint written by ``fit``: a file, or the folder of a sharded run.
        model: Another model instead: a folder that ``export`` wrote, a Hub name, a folder, a ``.gguf`` file, or
            ``embedded``.
        prompt: A prompt.
        input: Or a file of prompts, ``-`` for standard input: one in each line, or JSON lines with ``prompt``,
            ``instruction`` (and ``input``), ``question`` or ``messages`` (and ``tools``).
        output: File to write; by default standard output.
        format: ``text`` for just the answers, separated by empty lines; ``jsonl`` for the fields of each prompt with
            its answer as ``generation``. By default ``jsonl`` if ``output`` ends in ``.jsonl``.
        system: System message for conversations that have none.
        max_new_tokens: Length limit of answers.
        temperature: Sampling temperature; 0 always takes the likeliest token.
        top_p: Sample from the smallest set of likeliest tokens whose probabilities sum to this.
        top_k: Sample from this many likeliest tokens; 0 for all.
        num_return_sequences: Number of answers to each prompt.
        seed: Seed for sampling.
        batch_size: Number of prompts answered together; prompts of similar length are grouped.
        template: Prompt template, instead of that of training: ``alpaca``, ``chat``, ``plain`` or the path of a Jinja
            file.
        name_or_path: The current location of the base model; by default that of training.
        dtype: Dtype of the base weights, as for model.dtype; by default that of training.
        device: Device to compute on, such as ``cpu`` or ``cuda:1``; by default the accelerator, if there is one.
    """
    sampling = Sampling(temperature, top_p, top_k)
    if bool(prompt) == (input is not None):
        raise InvalidInputError("Give either --prompt TEXT or --input FILE (- for standard input).")
    for name, number in (("num_return_sequences", num_return_sequences), ("batch_size", batch_size)):
        if number < 1:
            raise InvalidInputError(f"{name} must be at least 1, not {number}.")
    if num_return_sequences > 1 and not temperature:
        raise InvalidInputError(
            "Without sampling all answers to a prompt are the same: give a temperature, 0.7 for example."
        )
    if output is not None and Path(output).expanduser().is_dir():
        raise InvalidInputError(f"output must be a file, and {output!r} is a folder.")
    if output is not None:
        check_file(output, "Answers")
        if (
            input is not None
            and input != "-"
            and Path(input).expanduser().resolve() == Path(output).expanduser().resolve()
        ):
            raise InvalidInputError(
                f"output would replace {input!r}, from which the prompts come: choose another file."
            )
    rows = [{"prompt": prompt}] if input is None else list(read_prompts(input))
    loaded, tokenizer = load_to_ask(ckpt_path, model, name_or_path, template, dtype, device)
    asker = Asker(loaded, tokenizer, sampling, max_new_tokens, num_return_sequences)
    asked = asker.encode(rows, system, input)
    seed_everything(seed, verbose=False)
    as_json = format == "jsonl" or (format == "auto" and output is not None and output.endswith(".jsonl"))
    with ExitStack() as stack:
        file = sys.stdout
        if output is not None:
            Path(output).expanduser().parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(Path(output).expanduser().open("w", encoding="utf-8"))
        stack.enter_context(adapters_merged(loaded))
        done = 0
        size = WINDOW * batch_size
        for start in range(0, len(rows), size):
            answers = asker.answer(asked[start : start + size], batch_size)
            _write(file, rows[start : start + size], answers, as_json, first=start == 0)
            done += len(answers)
            if output is not None:
                inform(f"{done} of {counted(len(rows), 'prompt')} answered, in {output}")


@dataclass(frozen=True)
class Asker:
    """Answers prompts in batches.

    Args:
        model: The model.
        tokenizer: Its tokenizer, whose chat template is that of training.
        sampling: How tokens are chosen.
        max_new_tokens: Length limit of answers.
        number: Number of answers to each prompt.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    max_new_tokens: int
    number: int = 1

    def encode(self, rows: Sequence[dict[str, Any]], system: str, name: str | None) -> list[list[int]]:
        """Return the token ids of all prompts.

        Raises:
            ValueError: If a row has no prompt, the template refuses it, or the model has no positions for an answer.
        """
        prompts, said = [], ""
        for number, row in enumerate(rows, 1):
            where = "The prompt" if name is None else f"Row {number} of {'standard input' if name == '-' else name}"
            try:
                ids = prompt_ids(conversation(row, system, self.tokenizer), self.tokenizer, tools_of(row))
            except MiLoRAError as error:
                raise InvalidInputError(f"{where} cannot be asked: {error}") from error
            length, sentence = room(self.model, len(ids), self.max_new_tokens)
            if length < self.max_new_tokens:
                raise InvalidInputError(f"{where} is too long: {sentence} Shorten it, or lower max_new_tokens.")
            said = said or (sentence and f"{where}: {sentence}")
            prompts.append(ids)
        if said:
            inform(said)
        return prompts

    def answer(self, prompts: Sequence[list[int]], batch_size: int) -> list[list[str]]:
        """Answer prompts, grouping those of similar length.

        Returns:
            The answers to each prompt.
        """
        answers: list[list[str]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, texts in zip(batch, self._batch([prompts[i] for i in batch]), strict=True):
                answers[i] = texts
        return answers

    @torch.no_grad()
    def _batch(self, prompts: list[list[int]]) -> Iterator[list[str]]:
        batch = padded(prompts, self.tokenizer, self.model.device)
        config = self.sampling.applied_to(greedy_config(self.model, self.tokenizer, self.max_new_tokens))
        config.num_return_sequences = self.number
        with use_generation_config(self.model, config):
            tokens = generate_greedily(self.model, **batch, config=config)
        answers = cut_at_stop(tokens, config.eos_token_id or [])
        decoded = cast("list[str]", self.tokenizer.batch_decode(answers, skip_special_tokens=True))
        return (decoded[i : i + self.number] for i in range(0, len(decoded), self.number))


def _write(
    file: TextIO, rows: Sequence[dict[str, Any]], answers: Sequence[list[str]], as_json: bool, first: bool
) -> None:
    for row, texts in zip(rows, answers, strict=True):
        for text in texts:
            if as_json:
                file.write(json.dumps({**row, "generation": text}, ensure_ascii=False) + "\n")
            else:
                text = printable(text) if file.isatty() else text
                file.write(text + "\n" if first else f"\n{text}\n")
            first = False
    file.flush()
