"""Scoring of generated code by its tests, as in HumanEval."""

from __future__ import annotations

import ast
import json
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from milora_lightning.metrics.sandbox import Limits, runs
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.machine import cores

ENDS = re.compile(r"\n(?=class\b|def\b|#|if\b|print\b|```)")
"""The beginnings of lines that end a function's body, as in HumanEval's paper."""


class Problem(NamedTuple):
    """A function to write, in HumanEval's format.

    Attributes:
        prompt: Imports, signature and docstring.
        entry_point: Name of the function.
        test: Definition of a function ``check(candidate)`` that raises an exception if the candidate is wrong.
    """

    prompt: str
    entry_point: str
    test: str

    @classmethod
    def read(cls, text: str) -> Problem:
        """Read what :meth:`written` returned.

        Raises:
            ValueError: If it is something else.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise InvalidInputError(
                f"The reference {text[:60]!r} is no problem of HumanEval's format, so no tests can be run. For "
                "validation data without tests, set data.num_generation_examples: 0."
            ) from error

    def written(self) -> str:
        """Write the problem as JSON."""
        return json.dumps(self._asdict())


def program_of(answer: str, problem: Problem) -> str:
    r"""Build a program from an answer to a problem, followed by the problem's tests.

    If the answer has a Markdown code block that defines the function, this and other blocks of definitions are used.
    Otherwise the answer is taken as the function's body, up to where something else begins.

    >>> problem = Problem('def one():\n    "Return 1."\n', "one", "def check(f):\n    assert f() == 1")
    >>> print(program_of("    return 1\n\nprint(one())", problem))
    def one():
        "Return 1."
        return 1
    <BLANKLINE>
    def check(f):
        assert f() == 1
    check(one)
    >>> "return 1\n\ndef check" in program_of("Sure:\n```python\ndef one():\n    return 1\n```\nBye!", problem)
    True
    """
    defines = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(problem.entry_point)}\b", re.MULTILINE)
    blocks = re.findall(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", answer, re.DOTALL)
    code = next((block for block in blocks if defines.search(block)), blocks[0] if blocks else answer)
    prompt = problem.prompt.rstrip()
    if defines.search(code):  # after the prompt, whose imports and helpers it may use
        prompt = prompt if _parses(prompt) else f"{prompt}\n    pass"
        others = [textwrap.dedent(block) for block in blocks if not defines.search(block) and _only_defines(block)]
        code = "\n\n".join([prompt, *others, _without_prose(textwrap.dedent(code))])
    else:
        body = ENDS.split(code.strip("\n"))[0].strip("\n")
        code = _with_body(prompt, body)
    return f"{code}\n\n{problem.test.strip()}\ncheck({problem.entry_point})"


def _only_defines(block: str) -> bool:
    r"""Return whether a block of code has only imports and definitions, like a helper, unlike an example of its use.

    >>> _only_defines("import math\n\ndef half(x):\n    return x / 2"), _only_defines("print(half(2))")
    (True, False)
    """
    code = textwrap.dedent(block)
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return _parses(code) and all(
        isinstance(statement, definitions)
        or (isinstance(statement, ast.Assign) and not any(isinstance(node, ast.Call) for node in ast.walk(statement)))
        for statement in ast.parse(code).body
    )


def _with_body(prompt: str, body: str) -> str:
    r"""Append a function's body to its beginning; decoding may have removed spaces from its first line.

    >>> print(_with_body("def one():", "if True:\n        return 1\n    return 2"))
    def one():
        if True:
            return 1
        return 2
    """
    as_written = body if body.startswith((" ", "\t")) else textwrap.indent(body, "    ")
    codes = [f"{prompt}\n{each}" for each in (as_written, f"    {body.lstrip()}")]
    return next(filter(_parses, codes), codes[0])


def _without_prose(code: str) -> str:
    r"""Remove prose before and after a program.

    >>> _without_prose("Here it is:\n\ndef one():\n    return 1\n\nIt returns 1.")
    'def one():\n    return 1'
    """
    start = re.search(r"^(?:import|from|def|class|async def|@)\b", code, re.MULTILINE)
    lines = code[start.start() if start else 0 :].rstrip().splitlines()
    for stop in range(len(lines), 0, -1):
        if _parses(text := "\n".join(lines[:stop]).rstrip()):
            return text
    return code


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def passes(answer: str, reference: str, limits: Limits = Limits()) -> bool:  # noqa: B008  (immutable)
    """Return whether an answer passes the tests of its problem. This runs the answer as a program.

    Args:
        answer: What a model wrote.
        reference: The problem, as :meth:`Problem.written` returns it.
        limits: Limits of the program.
    """
    return runs(program_of(answer, Problem.read(reference)), limits)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimate without bias the probability that at least one of k samples is right: 1 − C(n−c, k) / C(n, k).

    Args:
        samples: Number n of samples of a problem.
        right: Number c of them that are right.
        k: Number of samples to choose from.

    Raises:
        ValueError: If there are fewer than k samples.

    >>> pass_at_k(4, 1, 1), pass_at_k(2, 1, 2), round(pass_at_k(200, 10, 100), 6)
    (0.25, 1.0, 0.999229)
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise InvalidInputError(f"pass@{k} cannot be estimated from {right} right ones of {samples} samples.")
    return 1 - comb(samples - right, k) / comb(samples, k)


def pass_rates(results: Mapping[str, Sequence[bool]], ks: Iterable[int] = (1, 10, 100)) -> dict[str, float]:
    """Return pass@k, the mean over problems, for each k of which every problem has enough samples.

    Args:
        results: For each problem, whether each of its samples is right.
        ks: Values of k.

    >>> pass_rates({"a": [True, False], "b": [False, False]}, ks=(1, 2, 3))
    {'pass@1': 0.25, 'pass@2': 0.5}
    """
    fewest = min(map(len, results.values()), default=0)
    return {
        f"pass@{k}": sum(pass_at_k(len(each), sum(each), k) for each in results.values()) / len(results)
        for k in ks
        if k <= fewest
    }


class PassRate(Metric):
    """Fraction of answers that pass the tests of their problems. Its updates run the answers as programs.

    Args:
        limits: Limits of each program.

    ``compute`` returns it as ``pass@1``. For several samples of each problem, see :func:`pass_rates`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008  (immutable)
        super().__init__()
        self.limits = limits
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, generations: Sequence[str], references: Sequence[str]) -> None:
        """Run answers, several at a time, and count those that pass."""
        if len(generations) != len(references):
            raise InvalidInputError(f"There are {len(generations)} generated texts but {len(references)} references.")
        with ThreadPoolExecutor(min(8, cores())) as pool:
            passed = list(pool.map(partial(passes, limits=self.limits), generations, references))
        self.correct += sum(passed)
        self.total += len(passed)

    def compute(self) -> dict[str, Tensor]:
        """Return ``pass@1``, NaN if there were no answers."""
        return {"pass@1": self.correct / self.total}
