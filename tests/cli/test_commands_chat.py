"""``chat`` in a pipe and on a terminal, and ``generate``: answers are those of the model, asked as in training."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat_templates import CHATML, QWEN25_TOOLS, chat_tokenizer
from helpers.chats import ids_of
from helpers.conversations import TOOL, user, with_calls
from helpers.models import save_tiny_model
from helpers.trained import train
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from milora_lightning import SFTDataModule, adapters_disabled, load_for_inference
from milora_lightning.cli.commands.prompts import conversation, read_prompts, tools_of
from milora_lightning.cli.main import main
from milora_lightning.cli.terminal import typed_lines
from milora_lightning.data import Files
from milora_lightning.data.encoding.asking import TextStream, prompt_ids
from milora_lightning.data.encoding.prompt_format import PromptFormat

LENGTH = 8
FIRST, SECOND = "What is 1 plus 2?", "What is 4 plus 5?"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained in its chat template, and what is made of it."""
    return train(tmp_path_factory.mktemp("chats"), "chat")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on single questions."""
    return train(tmp_path_factory.mktemp("questions"), "alpaca")


class Reference:
    """Answers by transformers' own generate, prompt by prompt."""

    def __init__(self, path: Path) -> None:
        self.model, self.tokenizer = load_for_inference(path, device="cpu")

    def __call__(self, *contents: str, system: str = "", base: bool = False) -> str:
        roles = ("user", "assistant") * len(contents)
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        options = {"max_new_tokens": LENGTH, "do_sample": False}
        if base:
            with adapters_disabled(self.model):
                tokens = self.model.generate(**prompt, **options)
        else:
            tokens = self.model.generate(**prompt, **options)
        return str(self.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def talk(monkeypatch: Any, capsys: Any, path: Path, *lines: str, **options: Any) -> tuple[str, str]:
    """Chat in a pipe; returns the answers, which are all of standard output, and what was said beside them."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    name = "--ckpt_path" if path.suffix == ".ckpt" else "--model"
    more = [f"--{key}={value}" for key, value in options.items()]
    main(["chat", name, str(path), "--max_new_tokens", str(LENGTH), "--device=cpu", *more])
    return tuple(capsys.readouterr())


def lines(*texts: str) -> str:
    return "".join(f"{text}\n" for text in texts)


@pytest.mark.parametrize("kind", ["a.ckpt", "peft"])
def test_a_conversation_in_a_pipe(kind: str, chats: Path, monkeypatch: Any, capsys: Any) -> None:
    says = Reference(chats / kind)
    first = says(FIRST)
    second = says(FIRST, first, SECOND)
    base = says(FIRST, first, SECOND, second, FIRST, base=True)
    assert base != says(FIRST, first, SECOND, second, FIRST)
    assert second != says(SECOND)  # negative control: the first turn matters
    capsys.readouterr()
    answers, notes = talk(monkeypatch, capsys, chats / kind, FIRST, SECOND, "/base", FIRST, "/reset", "/adapter", FIRST)
    assert answers == lines(first, second, base, first)
    assert notes == lines("The base model answers.", "A new conversation.", "The adapters are on.")


def test_both_answers_to_a_question(chats: Path, monkeypatch: Any, capsys: Any) -> None:
    says = Reference(chats / "a.ckpt")
    first = says(FIRST)
    capsys.readouterr()
    answers, notes = talk(monkeypatch, capsys, chats / "a.ckpt", "/both", FIRST, SECOND)
    assert says(FIRST, base=True) != first
    then = says(FIRST, first, SECOND, base=True), says(FIRST, first, SECOND)
    assert answers == lines(says(FIRST, base=True), first, *then)
    assert notes == lines("Both answer.", *["base:", "adapter:"] * 2)
    assert "no adapters" in talk(monkeypatch, capsys, chats / "merged", "/both")[1]


def test_single_questions_are_asked_by_themselves(questions: Path, monkeypatch: Any, capsys: Any) -> None:
    says = Reference(questions / "a.ckpt")
    for kind in ("a.ckpt", "peft", "merged"):
        answers, note = talk(monkeypatch, capsys, questions / kind, FIRST, SECOND)
        assert "without earlier turns" in note
        assert answers == lines(says(FIRST), says(SECOND))
    answers, _ = talk(monkeypatch, capsys, questions / kind, FIRST, SECOND, earlier_turns="true")
    first = says(FIRST)
    assert answers == f"{first}\n{says(FIRST, first, SECOND)}\n"
    assert says(FIRST, first, SECOND) != says(SECOND)


@pytest.mark.parametrize("kind", ["chats", "questions"])
def test_what_is_saved_is_read_by_fit(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    path = request.getfixturevalue(kind) / "a.ckpt"
    file = tmp_path / "saved.jsonl"
    _, notes = talk(
        monkeypatch, capsys, path, f"/save {file}", FIRST, SECOND, "/system Be kind.", FIRST, f"/save {file}"
    )
    assert "nothing to save yet" in notes
    (row,) = map(json.loads, file.read_text().splitlines())
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][0]["content"] == "Be kind."
    talk(monkeypatch, capsys, path, FIRST, SECOND, f"/save {file}")
    assert len(file.read_text().splitlines()) == 1 + (1 if kind == "chats" else 2)
    data = SFTDataModule(Files(str(file)), str(path.parent / "base"))
    data.setup("fit")
    assert len(data.examples("train")) == (2 if kind == "chats" else 3)


def test_a_system_message(chats: Path, monkeypatch: Any, capsys: Any) -> None:
    says = Reference(chats / "a.ckpt")
    want = says(FIRST, system="Be brief.")
    assert talk(monkeypatch, capsys, chats / "a.ckpt", FIRST, system="Be brief.")[0] == f"{want}\n"
    answers, notes = talk(monkeypatch, capsys, chats / "a.ckpt", "/system Be brief.", FIRST, "/system", FIRST)
    begun = "A new conversation"
    assert answers == lines(want, says(FIRST))
    assert notes == lines(f"{begun} with the system message 'Be brief.'.", f"{begun}.")
    assert says(FIRST) != want


def test_lines_that_are_no_questions(chats: Path, monkeypatch: Any, capsys: Any) -> None:
    says = Reference(chats / "a.ckpt")
    typed = ["", "/nothing", "/save", " /etc is", "What is\\", "1?", "/exit", FIRST]
    capsys.readouterr()
    answers, notes = talk(monkeypatch, capsys, chats / "a.ckpt", *typed)
    first = says("/etc is")
    assert answers == lines(first, says("/etc is", first, "What is\n1?"))
    assert notes == lines("There is no command /nothing; /help lists the commands.", "There is nothing to save yet.")
    assert "/both" in talk(monkeypatch, capsys, chats / "a.ckpt", "/help")[1]


def test_what_is_piped_in_is_asked_to_its_end(chats: Path, monkeypatch: Any, capsys: Any) -> None:
    """Also where the last line is to go on, and there is no other."""
    want = f"{Reference(chats / 'a.ckpt')(FIRST)}\n"
    capsys.readouterr()
    for text in (FIRST, f"{FIRST}\\", f"{FIRST}\\\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        main(["chat", "--ckpt_path", str(chats / "a.ckpt"), f"--max_new_tokens={LENGTH}", "--device=cpu"])
        assert capsys.readouterr().out == want


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_lines_of_other_encodings_are_refused(errors: str, monkeypatch: Any) -> None:
    for read in (lambda: list(typed_lines()), lambda: list(read_prompts("-"))):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors=errors))
        with pytest.raises(ValueError, match="no text in UTF-8"):
            read()


def test_a_fixed_number_of_positions_ends_a_conversation(
    chats: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    _, tokenizer = load_for_inference(chats / "base", device="cpu")
    prompt = len(prompt_ids([{"role": "user", "content": FIRST}], tokenizer))
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=prompt + 2)
    model = GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, notes = talk(monkeypatch, capsys, tmp_path, FIRST, SECOND)
    assert f"has {prompt + 2} positions, and the prompt takes {prompt}: 3 are left" in notes.splitlines()[0]
    assert "0 are left. /reset starts" in notes.splitlines()[-1]
    with pytest.raises(SystemExit, match=r"The prompt is too long: .* lower max_new_tokens"):
        main(["generate", "--model", str(tmp_path), "--prompt", FIRST])


def terminal(path: Path, *steps: tuple[str, str]) -> str:
    """Run chat on a terminal: wait for what a pattern finds, then write a text; returns all that was seen."""
    options = ["--ckpt_path", str(path), "--device=cpu", "--max_new_tokens=4000"]
    child, fd = pty.fork()
    if child == 0:  # a program of its own: a fork of this process, which has threads, may hang
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which jobs in the background of a shell ignore
        os.execv(sys.executable, [sys.executable, "-m", "milora_lightning", "chat", *options])
    seen, mark, end = "", 0, time.monotonic() + 240
    for awaited, written in steps:
        while (found := re.compile(awaited, re.DOTALL).search(seen, mark)) is None:
            assert time.monotonic() < end, seen
            if select.select([fd], [], [], 0.1)[0]:
                try:
                    seen += os.read(fd, 4096).decode(errors="replace")
                except OSError:  # chat has ended
                    pytest.fail(f"{awaited!r} did not come: {seen}")
        mark = found.end()
        os.write(fd, written.encode())
    while select.select([fd], [], [], 0.1)[0]:  # what is not read would keep it from ending
        try:
            seen += os.read(fd, 4096).decode(errors="replace")
        except OSError:
            break
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, seen
    return seen


def test_a_terminal_has_prompts_and_ctrl_c_stops_an_answer(chats: Path) -> None:
    """Of a model that would go on for thousands of tokens; the conversation then goes on."""
    start, end = "> ", "\x04"
    seen = terminal(
        chats / "a.ckpt",
        (start, "/base\n"),
        ("The base model answers.", ""),
        (start, f"{FIRST}\n"),
        (f"{re.escape(FIRST)}\r\n.", "\x03"),  # the answer has begun
        (re.escape("(stopped)"), ""),
        (start, "/save\n"),
        ("Give the name of a file", ""),  # so there is a conversation
        (start, end),
    )
    assert "/help shows the commands" in seen
    assert "weights" not in seen  # bars of other projects


def test_nothing_but_results_in_a_pipe(chats: Path, tmp_path: Path, capfd: Any) -> None:
    """None of the bars of other projects, which are there unless they are left out."""
    options = ["--ckpt_path", str(chats / "a.ckpt")]
    for command in (
        ["generate", "--prompt", FIRST, "--max_new_tokens=2", "--device=cpu"],
        ["export", "--format=merged", "--output", str(tmp_path / "merged")],
        ["export", "--output", str(tmp_path / "peft")],
        ["analyze", "--output", str(tmp_path / "tables")],
    ):
        transformers_logging.enable_progress_bar()
        main([*command, *options])
        out, err = capfd.readouterr()
        assert not err
        assert not set("\r\b\x1b") & set(out)


class Pieces:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


def test_pieces_of_an_answer_are_whole_characters() -> None:
    pieces: list[str] = []
    stream = TextStream(Pieces(), {0}, pieces.append)  # type: ignore[arg-type]
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in "né 😀".encode() + b"\xc3\0":
        stream.put(torch.tensor([token]))
    stream.end()
    assert pieces == ["n", "é", " ", "😀", "\ufffd"]  # the last one, cut off, comes at the end


def generate(capsys: Any, path: Path, *options: str) -> str:
    name = "--ckpt_path" if path.suffix == ".ckpt" else "--model"
    capsys.readouterr()
    main(["generate", name, str(path), "--max_new_tokens", str(LENGTH), "--device=cpu", *options])
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["chats", "questions"])
def test_prompts_of_different_lengths_are_answered_as_each_alone(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    path = request.getfixturevalue(kind) / "a.ckpt"
    says = Reference(path)
    prompts = [FIRST, "Hi", SECOND + " 1 plus 2?" * 2]
    want = [says(prompt) for prompt in prompts]
    assert len(set(want)) > 1
    assert generate(capsys, path, "--prompt", FIRST) == f"{want[0]}\n"
    for odd in ("#1 plus 2?", "null", "[1, 2]"):  # as it stands, not read as YAML
        assert generate(capsys, path, "--prompt", odd) == f"{says(odd)}\n"
    text = "".join(f"{answer}\n\n" for answer in want)[:-1]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(prompts)))
    assert generate(capsys, path, "--input", "-", "--batch_size=2") == text
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    file = tmp_path / "made" / "answers.txt"
    assert generate(capsys, path, f"--input={tmp_path / 'prompts.txt'}", f"--output={file}") == ""
    assert file.read_bytes().decode() == text


def test_json_rows_keep_their_fields(chats: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    messages = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": "3"}]
    more = [*messages, {"role": "user", "content": SECOND}]
    rows = [
        {"prompt": FIRST, "id": 7},
        {"messages": messages},
        {"messages": more},
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    says = Reference(chats / "peft")
    want = [says(FIRST), says(FIRST), says(FIRST, "3", SECOND), says("Add.\n\n1, 2")]
    printed = generate(capsys, chats / "peft", f"--input={file}", "--format=jsonl")
    assert [json.loads(line) for line in printed.splitlines()] == [
        {**row, "generation": answer} for row, answer in zip(rows, want, strict=True)
    ]
    says = Reference(questions / "a.ckpt")  # where the instruction has an input as in training
    generate(capsys, questions / "a.ckpt", f"--input={file}", f"--output={tmp_path / 'out.jsonl'}")
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[3])["generation"] == says("1, 2", system="Add.")


def test_rows_are_asked_as_training_data_are_read(chats: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """With other names of fields, a system message, contents in parts, in compressed files and tables."""
    says = Reference(chats / "peft")
    want, brief = says(FIRST), says(FIRST, system="Be brief.")
    assert want != brief
    parts = [{"type": "text", "text": FIRST[:5]}, {"type": "text", "text": FIRST[5:]}]
    rows = [
        {"conversations": [{"from": "human", "value": FIRST}, {"from": "gpt", "value": "3"}]},
        {"messages": [{"role": "user", "content": parts}]},
        {"Question": FIRST},
        {"query": FIRST, "system": "Be brief."},
        {"messages": [{"role": "user", "content": FIRST}], "system_prompt": "Be brief."},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    answers = lines(*[f"{want}\n"] * 3, f"{brief}\n", brief)
    assert generate(capsys, chats / "peft", f"--input={tmp_path / 'rows.jsonl.gz'}") == answers
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(rows, indent=1)))
    assert generate(capsys, chats / "peft", "--input=-") == answers
    (tmp_path / "rows.csv").write_text(f"id,question\n1,{FIRST}\n2,{SECOND}\n")
    assert generate(capsys, chats / "peft", f"--input={tmp_path / 'rows.csv'}") == lines(f"{want}\n", says(SECOND))


def test_lines_end_where_lines_of_json_do(tmp_path: Path, monkeypatch: Any) -> None:
    rows = [{"prompt": "a\u2028b"}, {"prompt": "c\x0cd\x85"}]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)))
    assert list(read_prompts("-")) == rows
    (tmp_path / "prompts.txt").write_text("a\u2028b\r\nc\x0cd\x85\r\n", newline="")
    assert list(read_prompts(str(tmp_path / "prompts.txt"))) == rows


def test_tools_are_a_part_of_the_prompt() -> None:
    """Or refused where the template has no place for them."""
    row = {"messages": with_calls({"a": 1})[:3], "tools": json.dumps([TOOL])}
    tokenizer = chat_tokenizer(QWEN25_TOOLS)
    asked = conversation(row, "", tokenizer)
    want = ids_of(tokenizer, row["messages"], tools=[TOOL], add_generation_prompt=True)
    assert prompt_ids(asked, tokenizer, tools_of(row)) == want != prompt_ids(asked, tokenizer)
    with pytest.raises(ValueError, match="leaves out the tools"):
        prompt_ids([user()], chat_tokenizer(CHATML), [TOOL])
    single = chat_tokenizer(CHATML)
    single = PromptFormat.of(single, "alpaca").applied_to(single)
    for messages in (asked, [user(), {"role": "tool", "content": "3"}]):
        with pytest.raises(ValueError, match="no place for tools"):
            prompt_ids(messages, single)


def test_drawn_answers_hang_on_the_seed(chats: Path, capsys: Any) -> None:
    draws = ["--temperature=3", "--num_return_sequences=3", "--format=jsonl", "--prompt", FIRST]
    first, again, other = (generate(capsys, chats / "a.ckpt", *draws, f"--seed={seed}") for seed in (1, 1, 2))
    assert first == again != other
    assert len({json.loads(line)["generation"] for line in first.splitlines()}) == 3
    narrow = generate(capsys, chats / "a.ckpt", *draws, "--top_k=1")  # which leaves the likeliest token
    assert {json.loads(line)["generation"] for line in narrow.splitlines()} == {Reference(chats / "a.ckpt")(FIRST)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "Hi", "--top_p=0.9"], "top_p=0.9 has no effect"),
        (["--prompt", "Hi", "--temperature=-1"], "temperature must be 0 or more"),
        (["--prompt", "Hi", "--num_return_sequences=2"], "give a temperature"),
        ([], "Give either --prompt TEXT or --input FILE"),
        (["--input", "none.txt"], "There is no file 'none.txt'"),
        (["--input", "empty.txt"], "There are no prompts in empty.txt"),
        (["--input", "odd.txt"], "Line 2 of odd.txt is no JSON object"),
        (["--input", "other.jsonl"], "Row 1 of other.jsonl cannot be asked: it has none of the fields"),
        (["--input", "answers.jsonl"], "none but the assistant's"),
    ],
)
def test_what_cannot_be_answered_is_named(
    options: list[str], message: str, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("odd.txt").write_text('{"prompt": "Hi"}\nHi\n')
    Path("other.jsonl").write_text('{"text": "Hi"}\n')
    Path("answers.jsonl").write_text('{"messages": [{"role": "assistant", "content": "Hi"}]}\n')
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["generate", "--ckpt_path", str(chats / "a.ckpt"), "--device=cpu", *options])


def test_a_model_that_nobody_knows_how_to_ask(tmp_path: Path, capsys: Any) -> None:
    save_tiny_model(tmp_path, "llama")
    with pytest.raises(SystemExit, match=r"no chat template.*--template"):
        main(["chat", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="Give either --ckpt_path"):
        main(["chat"])
    assert generate(capsys, tmp_path, "--prompt", FIRST, "--template=plain")


def test_predict_answers_prompts_without_answers(chats: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In a file without the field, or with some that are empty, which an evaluation leaves out."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (FIRST, SECOND)))
    some = [{"instruction": FIRST, "output": ""}, {"instruction": SECOND, "output": "9"}]
    Path("some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    says = Reference(chats / "a.ckpt")
    for file, references in (("prompts.jsonl", ["", ""]), ("some.jsonl", ["", "9"])):
        options = [
            "--ckpt_path",
            str(chats / "a.ckpt"),
            "--data.source=milora_lightning.data.Files",
            "--data.template=chat",
        ]
        options += ["--data.source.test", file, f"--model.max_new_tokens={LENGTH}", "--trainer.logger=false"]
        main(["predict", *options, "--predictions.output=out.jsonl", "--trainer.accelerator=cpu"])
        records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        assert [r["generation"] for r in records] == [says(FIRST), says(SECOND)]
        assert [r["reference"] for r in records] == references
    data = SFTDataModule(Files(test="some.jsonl"), str(chats / "base"), template="chat")
    for stage, number in (("predict", 2), ("test", 1), ("predict", 2)):
        data.setup(stage)
        assert len(data.examples("test")) == number
    data = SFTDataModule(Files(test="prompts.jsonl", response_field="answer"), str(chats / "base"))
    with pytest.raises(ValueError, match="No example of the test data has a response"):
        data.setup("test")
    Path("texts.jsonl").write_text(json.dumps({"text": FIRST}))
    data = SFTDataModule(Files(test="texts.jsonl"), str(chats / "base"))
    data.setup("predict")
    with pytest.raises(ValueError, match="nothing to answer in the test data"):
        data.predict_dataloader()
