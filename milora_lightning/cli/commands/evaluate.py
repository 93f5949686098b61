"""``evaluate``: runs benchmarks of the evaluation harness (lm-eval) on a checkpoint and on its base model."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.adapters.contexts import adapters_disabled
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.cli.commands.loading import loading
from milora_lightning.inference import load_for_inference
from milora_lightning.models.processor import DtypeName
from milora_lightning.utils.errors import InvalidInputError, MissingFileError, MissingPackageError, OutputExistsError
from milora_lightning.utils.folders import check_file
from milora_lightning.utils.suggestions import similar

Scores = dict[str, dict[str, float]]
"""Values of metrics by name, for each task by name."""


def evaluate(
    tasks: str,
    ckpt_path: str | None = None,
    model: str | None = None,
    base: bool = False,
    output: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    include_path: str | None = None,
    name_or_path: str | None = None,
    dtype: DtypeName | None = None,
    device: str | None = None,
) -> None:
    """Score a model on benchmarks of the evaluation harness (lm-eval), before and after fine-tuning.

    Args:
        tasks: Names of tasks or groups of the harness, as in ``gsm8k,arc_easy``, or YAML files of your own tasks.
        ckpt_path: Checkpoint written by ``fit``: a file, or the folder of a sharded run.
        model: Another model instead: a folder that ``export`` wrote, a Hub name, a folder, a ``.gguf`` file, or
            ``embedded``.
        base: Also score the model without its adapters, to show what training has changed.
        output: JSON file to write the results to.
        limit: Number of examples of each task, for a quick test; by default all.
        num_fewshot: Number of examples in the prompt; by default that of each task.
        batch_size: Number of prompts in a batch.
        apply_chat_template: Use the prompt template of the model's training; by default prompts are used as the tasks
            define them.
        include_path: Folder with YAML files of your own tasks.
        name_or_path: The current location of the base model; by default that of training.
        dtype: Dtype of the base weights, as for model.dtype; by default that of training.
        device: Device to compute on; by default the accelerator, if there is one.
    """
    if (ckpt_path is None) == (model is None):
        raise InvalidInputError(
            "Give either --ckpt_path, a checkpoint of fit, or --model, an exported folder or another model."
        )
    if output is not None and (Path(output).exists() or not Path(output).absolute().parent.is_dir()):
        raise OutputExistsError(f"{output!r} already exists, or its folder does not: choose another output.")
    if output is not None:
        check_file(output, "Results")
    if include_path is not None and not Path(include_path).is_dir():
        raise MissingFileError(
            f"There is no folder {include_path!r}: include_path is the folder with the YAML files of your tasks."
        )
    manager, names = find_tasks(tasks, include_path)
    with loading():
        loaded, tokenizer = load_for_inference(str(ckpt_path or model), False, device, dtype, name_or_path)
    if base and not lora_layers(loaded):
        raise InvalidInputError(
            "The model has no adapters to switch off: leave --base out, and evaluate the base model by --model."
        )
    if apply_chat_template and not tokenizer.chat_template:
        raise InvalidInputError("The tokenizer has no chat template: leave --apply_chat_template out.")
    options = {
        "tasks": names,
        "task_manager": manager,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
    }
    results = {"model": score(loaded, tokenizer, batch_size, **options)}
    if base:
        results["base"] = score(loaded, tokenizer, batch_size, without_adapters=True, **options)
    Console().print(table({name: scores_in(result) for name, result in results.items()}, limit))
    if output is not None:
        Path(output).write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
        print(f"Results are in {output}")


def find_tasks(tasks: str, include_path: str | None) -> tuple[Any, list[str]]:
    """Find tasks of the harness by their names, before a model is loaded.

    Args:
        tasks: Names, patterns, or paths of YAML files of tasks, separated by commas.
        include_path: Folder with further tasks.

    Returns:
        The harness's ``TaskManager`` and the names of the tasks.

    Raises:
        ModuleNotFoundError: If the harness is not installed.
        ValueError: If there is no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError('evaluate needs the package lm-eval: pip install "milora-lightning[eval]"')
    from lm_eval.tasks import TaskManager

    wanted = [name for name in (part.strip() for part in tasks.split(",")) if name]
    if not wanted:
        raise InvalidInputError("tasks is empty: give names of the harness's tasks, as in --tasks gsm8k,arc_easy.")
    folders = {} if include_path is None else {include_path: None}
    for number, name in enumerate(wanted):
        if name.endswith((".yaml", ".yml")):
            wanted[number] = _task_in(name)
            folders[str(Path(name).absolute().parent)] = None
    include: Any = list(folders) or None
    known: list[str] = []
    if folders:
        manager = TaskManager(include_path=include, include_defaults=False)
        known = list(manager.all_subtasks)
        if set(wanted) <= set(known):  # reading the thousands of files of the harness's tasks is slow
            return manager, list(dict.fromkeys(wanted))
    manager = TaskManager(include_path=include)
    found: list[str] = []
    for name in wanted:
        matching = manager.match_tasks([name])
        if not matching:
            like = list(dict.fromkeys([*similar(name, known), *similar(name, manager.all_tasks)]))[:3]
            others = f", {' and '.join(map(repr, like[1:]))} others" if like[1:] else ""
            raise InvalidInputError(
                f"The harness has no task {name!r}{f'; {like[0]!r} is one{others}' if like else ''}."
            )
        found += matching
    return manager, list(dict.fromkeys(found))


def _task_in(path: str) -> str:
    """Return the name of the task or group that a YAML file defines."""
    if not Path(path).is_file():
        raise MissingFileError(f"There is no file {path!r}, which --tasks names: give a task's name, or its YAML file.")
    name = re.search(
        r"^(?:task|group)\s*:\s*['\"]?([^'\"\s#\[]+)", Path(path).read_text(encoding="utf-8"), re.MULTILINE
    )
    if name is None:
        raise InvalidInputError(f"{path!r} does not define a task: it has no line 'task: NAME'.")
    return name[1]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    without_adapters: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Score a model in memory with the harness.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        batch_size: Number of prompts in a batch.
        without_adapters: Whether to disable the adapters.
        options: Options of the harness's ``simple_evaluate``.

    Returns:
        The results of the harness, without the examples.

    Raises:
        ValueError: If a task cannot run, for example because its data cannot be loaded.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # It warns that only this process scores a model in memory, which is intended.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    with ExitStack() as stack:
        if without_adapters:
            stack.enter_context(adapters_disabled(model))
        harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        try:
            results = simple_evaluate(model=harness, log_samples=False, **options)
        except (OSError, ImportError) as error:  # no connection to the Hub, or a missing package
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            remedy = f" Run: pip install {missing}" if missing else ""
            raise InvalidInputError(
                f"The harness cannot run {', '.join(options['tasks'])}: {reason}.{remedy}"
            ) from error
    return dict(results or {})


def scores_in(results: dict[str, Any]) -> Scores:
    """Extract the values of metrics from the results of the harness.

    >>> scores_in({"results": {"sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 9}}})
    {'sums': {'acc': 0.5, 'acc_stderr': 0.1}}
    """
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if "," in key and isinstance(value, (int, float))
        }
        for task, values in results["results"].items()
    }


def table(scores: dict[str, Scores], limit: int | None) -> Table:
    """Create a table of the metrics of each task, with a column for each model."""
    drawn = Table("task", "metric", title=None if limit is None else f"The first {limit} examples of each task")
    columns = [name for name in ("base", "model") if name in scores]
    for name in columns:
        drawn.add_column(name, justify="right")
    for task, values in scores["model"].items():
        for metric in values:
            if "_stderr" not in metric:
                cells = [_with_error(scores[name][task], metric) for name in columns]
                drawn.add_row(task, metric, *cells)
    return drawn


def _with_error(values: dict[str, float], metric: str) -> str:
    name, comma, rest = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{rest}")
    return f"{values[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
