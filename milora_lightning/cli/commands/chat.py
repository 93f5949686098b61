"""``chat``: talk to a model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import seed_everything
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.adapters.contexts import adapters_disabled, adapters_merged
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.cli.commands.loading import load_to_ask
from milora_lightning.cli.terminal import edit_lines, interruptible, typed_lines
from milora_lightning.data.encoding.asking import NotAskableError, TextStream, check_askable, prompt_ids, room
from milora_lightning.data.encoding.chat import Message
from milora_lightning.data.encoding.prompt_format import reads_one_question
from milora_lightning.models.generation import Sampling, generate_greedily, greedy_config, use_generation_config
from milora_lightning.models.processor import DtypeName
from milora_lightning.models.turn_cache import TurnCache
from milora_lightning.utils.counting import counted
from milora_lightning.utils.printable import printable

HELP = """\
/base           answer with the base model, without its adapters
/adapter        answer with the adapters again
/both           show both answers to each question; the conversation continues with the adapters'
/reset          start a new conversation
/system TEXT    start a new conversation with a system message, or without one if TEXT is empty
/save FILE      add the conversation to FILE, as JSON lines that fit reads
/help           show this help
/exit           leave (or Ctrl-D)
Ctrl-C stops an answer. A \\ at the end of a line continues it on the next; a space before a / makes it text."""

Mode = Literal["adapter", "base", "both"]


def chat(
    ckpt_path: str | None = None,
    model: str | None = None,
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    earlier_turns: bool | None = None,
    template: str | None = None,
    name_or_path: str | None = None,
    dtype: DtypeName | None = None,
    device: str | None = None,
) -> None:
    """Talk to a model with the prompt template of its training; answers appear as they are generated.

    /help lists the commands, such as /both for the answers with and without adapters. In a pipe, each line of standard
    input is a question, and standard output holds only the answers.

    Args:
        ckpt_path: Checkpoint written by ``fit``: a file, or the folder of a sharded run.
        model: Another model instead: a folder that ``export`` wrote, a Hub name, a folder, a ``.gguf`` file, or
            ``embedded``.
        system: System message of the first conversation.
        max_new_tokens: Length limit of answers.
        temperature: Sampling temperature; 0 always takes the likeliest token.
        top_p: Sample from the smallest set of likeliest tokens whose probabilities sum to this.
        top_k: Sample from this many likeliest tokens; 0 for all.
        seed: Seed for sampling.
        earlier_turns: Whether the model sees the conversation so far; by default it does, unless its template
            (``alpaca``, ``plain``) only has room for a single question.
        template: Prompt template, instead of that of training: ``alpaca``, ``chat``, ``plain`` or the path of a Jinja
            file.
        name_or_path: The current location of the base model; by default that of training.
        dtype: Dtype of the base weights, as for model.dtype; by default that of training.
        device: Device to compute on, such as ``cpu`` or ``cuda:1``; by default the accelerator, if there is one.
    """
    sampling = Sampling(temperature, top_p, top_k)
    loaded, tokenizer = load_to_ask(ckpt_path, model, name_or_path, template, dtype, device)
    seed_everything(seed, verbose=False)
    one = reads_one_question(str(tokenizer.chat_template)) if earlier_turns is None else not earlier_turns
    talk = Talk(loaded, tokenizer, sampling, max_new_tokens, system, one)
    if sys.stdin.isatty():
        edit_lines()
        adapters = len(lora_layers(loaded))
        name = f"{ckpt_path or model}" + (f" ({counted(adapters, 'adapter')})" if adapters else "")
        talk.note(f"{name}; /help shows the commands.")
    if one:
        talk.note("Trained on single questions: the model sees each question by itself, without earlier turns.")
    with adapters_merged(loaded):
        for line in typed_lines():
            with interruptible() as cut:
                if not talk.take(line):
                    break
            if cut:  # before the answer had begun
                talk.note("(stopped)")


class Talk:
    """A conversation with a model, and the commands of its user.

    Args:
        model: The model.
        tokenizer: Its tokenizer, whose chat template is that of training.
        sampling: How tokens are chosen.
        max_new_tokens: Length limit of answers.
        system: System message; may be empty.
        one_question: Whether the model sees each question without the earlier ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        max_new_tokens: int,
        system: str = "",
        one_question: bool = False,
    ) -> None:
        check_askable(tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.system = system
        self.one_question = one_question
        self.mode: Mode = "adapter"
        self.read = TurnCache(model)
        self.turns: list[Message] = []
        self.commands: dict[str, Callable[[str], Any]] = {
            "base": lambda _: self.switch("base"),
            "adapter": lambda _: self.switch("adapter"),
            "both": lambda _: self.switch("both"),
            "reset": lambda _: self.begin(self.system),
            "system": self.begin,
            "save": self.save,
            "help": lambda _: self.note(HELP),
        }

    def take(self, line: str) -> bool:
        """Execute a command or answer a question; return False for the command to exit."""
        if not line.startswith("/"):
            if line.strip():
                self.ask(line.strip())
            return True
        name, _, rest = line[1:].partition(" ")
        name = name.strip()
        if name in ("exit", "quit"):
            return False
        if name in self.commands:
            self.commands[name](rest.strip())
        else:
            self.note(f"There is no command /{name}; /help lists the commands.")
        return True

    def ask(self, question: str) -> None:
        """Answer a question, and add both to the conversation."""
        asked: Message = {"role": "user", "content": question}
        try:
            ids = prompt_ids(self._seen(asked), self.tokenizer)
        except NotAskableError as error:
            self.note(str(error))
            return
        if self.mode == "both":
            self.note("base:")
            self._answer(ids, "base")
            self.note("adapter:")
        answer = self._answer(ids, "base" if self.mode == "base" else "adapter")
        if answer is not None:
            self.turns += [asked, {"role": "assistant", "content": answer}]

    def switch(self, mode: Mode) -> None:
        """Choose whether the adapters, the base model or both answer."""
        if mode != "adapter" and not lora_layers(self.model):
            self.note("This model has no adapters to switch off.")
            return
        self.mode = mode
        who = {"base": "The base model answers.", "adapter": "The adapters are on.", "both": "Both answer."}
        self.note(who[mode])

    def begin(self, system: str) -> None:
        """Start a new conversation."""
        self.turns, self.system = [], system
        self.note("A new conversation" + (f" with the system message {system!r}." if system else "."))

    def save(self, name: str) -> None:
        """Append the conversation to a file: one row, or one for each question if each was asked by itself."""
        if not name or not self.turns:
            self.note("Give the name of a file: /save FILE." if self.turns else "There is nothing to save yet.")
            return
        step = 2 if self.one_question else len(self.turns)
        rows = [{"messages": self._with_system(self.turns[i : i + step])} for i in range(0, len(self.turns), step)]
        path = Path(name).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            self.note(f"{name} cannot be written: {error.strerror}.")
            return
        self.note(f"{counted(len(self.turns), 'message')} added to {name}.")

    def note(self, text: str) -> None:
        """Print something that is not an answer, to standard error."""
        dims = sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")
        print(f"\033[2m{text}\033[0m" if dims else text, file=sys.stderr, flush=True)

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]

    def _seen(self, asked: Message) -> list[Message]:
        return self._with_system([*([] if self.one_question else self.turns), asked])

    def _answer(self, ids: list[int], who: Literal["adapter", "base"]) -> str | None:
        """Write an answer as it is generated, and return it; None if no positions are left for one."""
        length, said = room(self.model, len(ids), self.max_new_tokens)
        if length == 0:
            self.note(f"{said} /reset starts a new conversation.")
            return None
        if said:
            self.note(said)
        config = self.sampling.applied_to(greedy_config(self.model, self.tokenizer, length))
        stream = TextStream(self.tokenizer, config.eos_token_id or [], self._write)
        prompt = torch.tensor([ids], device=self.model.device)
        adapters = adapters_disabled(self.model) if who == "base" else nullcontext()
        with adapters, use_generation_config(self.model, config), torch.no_grad(), interruptible() as cut:
            cache = self.read.take(who, ids)
            tokens = generate_greedily(self.model, prompt, torch.ones_like(prompt), config, stream, cache)
            self.read.keep(who, ids + tokens[0].tolist(), cache)
        self._write("\n")
        if cut:
            self.note("(stopped)")
        return stream.text

    def _write(self, text: str) -> None:
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
