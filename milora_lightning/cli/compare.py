"""``compare``: trains several methods under the same conditions and reports the differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from milora_lightning.callbacks.choices import named_files
from milora_lightning.cli.comparing.single import Comparison, method_options
from milora_lightning.cli.comparing.stages import train_all
from milora_lightning.comparison.findings import Margins
from milora_lightning.comparison.runs import Run, check_same_examples
from milora_lightning.comparison.selection import best_rate, next_rate, set_apart
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import check_file
from milora_lightning.utils.messages import each_said_once


def compare(
    fit: Sequence[str],
    methods: list[str],
    output: str,
    learning_rates: list[float],
    seeds: list[int] = [0, 1, 2],  # noqa: B006 (never modified, and shown in the help)
    sweep_seeds: list[int] | None = None,
    sweep_seed: int | None = None,
    selection: str | None = None,
    selection_size: float = 0.3,
    extend: int = 3,
    reference: str | None = None,
    margin: float = 0.01,
    margin_ratio: float = 0.05,
    text: str | list[str] | dict[str, str] | None = None,
    text_field: str = "text",
    text_tokens: int = 16384,
    questions: str | list[str] | dict[str, str] | None = None,
    questions_number: int = 200,
    questions_every: Literal["validation", "end"] = "end",
    parallel: int | None = None,
) -> None:
    """Train several methods with several seeds, and write a report of how they compare.

    Every method has the same learning rates to choose from. Each rate is tried with separate seeds, and the one with
    the lowest final loss on separate examples is used for the reported runs. All other options are those of fit
    (--config, --trainer.max_steps ...) and apply to all runs; --trainer.val_check_interval sets how often results are
    recorded. An interrupted comparison continues with the unfinished runs.

    Args:
        fit: Options of ``fit`` that all runs share.
        methods: Names of shipped overlays (milora, pissa, lora, mica, milora-strict ...), paths of your own overlays,
            or starts as for adapter.init ("gaussian x minor").
        output: Folder for results.csv, report.md, report.html, the plots and a folder for each run.
        learning_rates: Learning rates to choose from, for every method.
        seeds: Seeds of the reported runs.
        sweep_seeds: Seeds of the learning-rate sweep, none of which is reported; by default the two after the largest
            reported seed.
        sweep_seed: A single seed of the sweep, instead of sweep_seeds.
        selection: Data on which rates are chosen, as for data.source.validation; by default a part of the validation
            data, which is then not reported.
        selection_size: The size of this part, as a fraction of the validation data; a fixed seed chooses it.
        extend: Maximum number of rates added to a method's grid while its best rate lies at the edge.
        reference: The method that the others are compared with; by default lora if it is among them, otherwise the
            first.
        margin: The largest difference in loss (nats per token) or accuracy (1 is 100 %) that counts as none.
        margin_ratio: The largest relative difference in forgetting (KL) or size of updates that counts as none.
        text: Held-out text on which forgetting is measured: a .txt, JSON, JSON lines or Parquet file, or a Hub name; or
            several, as a list or by name.
        text_field: Field that contains the text; not used for .txt files.
        text_tokens: Maximum number of tokens of each text to measure on.
        questions: Files of multiple-choice questions from other tasks, on which the reported runs are also measured: in
            the format of LLM-Adapters, or with the fields question, choices and answer.
        questions_number: Maximum number of questions from each file.
        questions_every: Ask them at each validation, or only at the end (and once before training), which takes less
            time.
        parallel: Number of runs at a time, each in a separate process, distributed over the GPUs; by default one per
            GPU. On CPUs they share the cores.

    Raises:
        ValueError: If a list is empty or has duplicates, or finished runs had other settings.
    """
    from milora_lightning.comparison.report import (
        write_report,
    )  # imports matplotlib, an optional package: fail before any work

    overlays = {Path(m).stem if m.endswith((".yaml", ".yml")) else m: method_options(m) for m in methods}
    sweep_seeds = _sweep_seeds(seeds, sweep_seeds, sweep_seed)
    lists: dict[str, list[Any]] = {
        "methods": methods,
        "learning_rates": learning_rates,
        "seeds": seeds,
        "sweep_seeds": sweep_seeds,
    }
    for name, values in lists.items():
        if not values or len(set(values)) < len(values) or len(overlays) < len(methods):
            raise InvalidInputError(f"{name}={values} must have at least one entry and no duplicates.")
    _check_numbers(selection_size, margin, margin_ratio, extend, parallel)
    reference = _reference(reference, list(overlays))
    check_file(Path(output) / "report.md", "The comparison")
    folder = Path(output).expanduser()
    fit = [*fit, *_update_and_text(text, text_field, text_tokens)]
    asks = (
        [] if questions is None else _monitor("ChoiceMonitor", _questions(questions, questions_number, questions_every))
    )
    comparison = Comparison([*fit, *asks], overlays, folder)
    # Rates are chosen by the loss only, so the sweep generates no answers.
    sweeping = Comparison([*fit, *_validation(selection), "--data.num_generation_examples=0"], overlays, folder)
    sweeps = len(learning_rates) > 1
    share = selection_size if sweeps and selection is None else None
    grid = [(method, rate) for method in overlays for rate in learning_rates]
    sweep = [Run(*point, seed) for point in grid for seed in sweep_seeds if sweeps]
    # The sweep decides which of these will run; all of them are checked now.
    possible = {run.name: run for run in (Run(*point, seed) for point in grid for seed in seeds)}
    with each_said_once():
        comparison.check(list(possible.values()))
        sweeping.check(sweep)
        check_same_examples([*possible.values(), *sweep])
        pending = sweep
        while pending:
            train_all(sweeping, pending, "Learning-rate sweep", False, parallel)
            for run in pending:
                set_apart(run, share if selection is None else 1.0)
            pending = [
                Run(method, rate, seed)
                for method in overlays
                if (rate := next_rate([run for run in sweep if run.method == method], learning_rates, extend))
                for seed in sweep_seeds
            ]
            sweeping.check(pending)
            sweep += pending
        best = {m: best_rate([run for run in sweep if run.method == m]) or learning_rates[0] for m in overlays}
        chosen = [Run(m, best[m], seed) for seed in seeds for m in overlays]
        comparison.check([run for run in chosen if run.name not in possible])
        runs = [possible.get(run.name, run) for run in chosen]
        train_all(comparison, runs, "Comparison", True, parallel)
        for run in runs:
            set_apart(run, share)
        check_same_examples([*runs, *sweep])
    margins = Margins(margin, margin_ratio)
    write_report(folder, runs, sweep, comparison.parse(runs[0]).config, reference, margins, learning_rates)
    print(f"The report is in {folder / 'report.html'} and {folder / 'report.md'}")


def _sweep_seeds(seeds: Sequence[int], given: list[int] | None, single: int | None) -> list[int]:
    if given is not None and single is not None:
        raise InvalidInputError("sweep_seed and sweep_seeds were both given: leave sweep_seed out.")
    if single is not None:
        given = [single]
    if given is None:
        return [max(seeds, default=0) + 1, max(seeds, default=0) + 2]
    if both := sorted(set(given) & set(seeds)):
        raise InvalidInputError(
            f"Seed {both[0]} is among seeds and among sweep_seeds: rates would be chosen on runs that are reported. "
            "Choose other sweep_seeds."
        )
    return given


def _check_numbers(
    selection_size: float, margin: float, margin_ratio: float, extend: int, parallel: int | None
) -> None:
    for name, value, right, expected in (
        ("selection_size", selection_size, 0 < selection_size < 1, "between 0 and 1"),
        ("margin", margin, 0 < margin < math.inf, "above 0"),
        ("margin_ratio", margin_ratio, 0 < margin_ratio < math.inf, "above 0"),
        ("extend", extend, extend >= 0, "0 or more"),
        ("parallel", parallel, parallel is None or parallel >= 1, "1 or more"),
    ):
        if not right:
            raise InvalidInputError(f"{name} must be {expected}, not {value}.")


def _reference(given: str | None, methods: list[str]) -> str:
    if given is None:
        return "lora" if "lora" in methods else methods[0]
    if given not in methods:
        raise InvalidInputError(f"reference={given!r} is not among the methods {methods}: choose one of them.")
    return given


def _validation(selection: str | None) -> list[str]:
    return [] if selection is None else [f"--data.source.init_args.validation={selection}"]


def _update_and_text(text: str | list[str] | dict[str, str] | None, field: str, tokens: int) -> list[str]:
    """Return the options of ``fit`` that measure the size of updates, and forgetting on text."""
    options = _monitor("UpdateMonitor", {})
    if text is not None:
        texts = text if isinstance(text, str) else named_files(text)
        options += _monitor("ForgettingMonitor", {"text": texts, "field": field, "max_tokens": tokens})
    return options


def _questions(files: str | list[str] | dict[str, str], number: int, every: str) -> dict[str, Any]:
    return {"questions": named_files(files), "number": number, "every": every}


def _monitor(name: str, options: dict[str, Any]) -> list[str]:
    given = [f"--trainer.callbacks.{option}={value}" for option, value in options.items()]
    return [f"--trainer.callbacks+=milora_lightning.{name}", *given]
