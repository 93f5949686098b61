"""Do the directions of a start decide what is learned and forgotten, or its magnitude? A comparison of starts.

Any directions are combined with any singular values, as the exact layer allows: if `gaussian x minor` does as `milora`,
and `minor x principal` as `pissa`, magnitude decides. The task is generated word problems with exact answers;
forgetting is measured on two kinds of text and, with `--questions FOLDER`, on multiple-choice files of LLM-Adapters.
The whole design is for a GPU; `--small` is for two cores, for two to four hours. It goes on where it stopped.

    python benchmarks/experiment.py --small --questions FOLDER --output runs/experiment

With `--publish`, its report goes to the page of results.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics

from common import publish
from figures import PLOTS

from milora_lightning.cli.main import main as milora

TASKS = ("ARC-Easy", "piqa", "openbookqa", "social_i_qa")
CODE = ("argparse", "ast", "csv", "difflib", "doctest", "inspect", "shutil", "tarfile", "textwrap", "zipfile")

SMALL = {
    "methods": "[lora,milora,pissa,random,gaussian x minor,minor x principal]",
    "learning_rates": "[3e-4,1e-3,3e-3]",
    "seeds": "[0,1,2]",
    "sweep_seeds": "[3]",
    "extend": "1",
    "text_tokens": "1024",
    "questions_number": "20",
    "parallel": "2",
    "model.dtype": "float32",
    "data.global_batch_size": "2",
    "data.source.train_size": "400",
    "data.source.validation_size": "48",
    "data.source.max_chars": "240",
    "data.num_generation_examples": "32",
    "trainer.max_steps": "200",
    "trainer.val_check_interval": "50",
}
"""Options of the design for two cores: 200 steps of 2 problems, 36 runs and at most 6 for grids that grow."""

WHOLE = {
    "methods": "[lora,rslora,milora,milora-strict,pissa,random,middle,slice 0.25,slice 0.75,gaussian x minor,"
    "gaussian x principal,minor x principal,principal x minor,mica,olora,"
    "corda,lora_null,eva,lora_ga]",
    "learning_rates": "[1e-4,2.15e-4,4.64e-4,1e-3,2.15e-3,4.64e-3,1e-2]",
    "seeds": "[0,1,2,3,4]",
    "sweep_seeds": "[5,6]",
    "extend": "2",
    "text_tokens": "16384",
    "questions_number": "500",
    "data.global_batch_size": "16",
    "data.source.train_size": "9600",
    "data.source.validation_size": "768",
    "data.source.max_chars": "320",
    "data.num_generation_examples": "null",
    "trainer.max_steps": "600",
    "trainer.val_check_interval": "100",
}
"""Options of the whole design: 600 steps of 16 problems, 361 runs and those for grids that grow."""

ALWAYS = {
    "config": "milora.yaml",
    "model.name_or_path": "embedded",
    "model.warmup_steps": "0.1",
    "adapter.r": "8",
    "adapter.lora_dropout": "0",
    "data.eval_batch_size": "16",
    "trainer.max_epochs": "null",
    "trainer.num_sanity_val_steps": "-1",
}
"""Options of both: r = 8, the paper's five modules, no dropout, AdamW without decay, no clipping, a linear schedule."""


def write_texts(folder: Path) -> dict[str, str]:
    """Write two kinds of text that every Python has: what its manual says, and what its library is written in."""
    kinds = {
        "manual": "\n\n".join(topics[name] for name in sorted(topics)),
        "code": "\n\n".join(inspect.getsource(import_module(name)) for name in CODE),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in kinds.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: str(folder / f"{name}.txt") for name in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the design for two cores")
    parser.add_argument("--questions", type=Path, help="folder with NAME_test.json or NAME/test.json of LLM-Adapters")
    parser.add_argument("--output", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--publish", action="store_true", help="write the report to the page of results")
    given, more = parser.parse_known_args()
    options = {**ALWAYS, **(SMALL if given.small else WHOLE), "output": str(given.output)}
    options["text"] = str(write_texts(given.output / "texts"))
    if given.questions is not None:
        places = {task: [given.questions / f"{task}_test.json", given.questions / task / "test.json"] for task in TASKS}
        found = {task: str(path) for task, paths in places.items() for path in paths if path.is_file()}
        if missing := sorted(places.keys() - found):
            parser.error(f"{given.questions} has no test file of {', '.join(missing)}: point to the folder that does.")
        options["questions"] = str(found)
    else:
        options.pop("questions_number")
    milora(["compare", *(part for name, value in options.items() for part in (f"--{name}", value)), *more])
    if given.publish:
        report = (given.output / "report.md").read_text(encoding="utf-8")
        for name in ("learning_curves", "learning_forgetting"):
            shutil.copy(given.output / f"{name}.png", PLOTS / f"comparison_{name}.png")
            report = report.replace(f"({name}.png)", f"(../plots/comparison_{name}.png)")
        publish("comparison", report.split("\n", 2)[2].strip().replace("\n## ", "\n#### "))


if __name__ == "__main__":
    main()
