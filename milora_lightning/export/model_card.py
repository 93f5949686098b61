"""The model card of an export: its content, how to load it, and its training data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.linear_layers import matrices_in
from milora_lightning.export.peft_format import TASKS, base_name, task_type
from milora_lightning.utils.counting import counted
from milora_lightning.utils.markdown import table

CARD = "README.md"


def model_card(
    model: PreTrainedModel,
    what: str,
    library: str,
    metrics: Mapping[str, float] | None = None,
    data: str | None = None,
    notes: str = "",
) -> str:
    """Write the text of a model card.

    Args:
        model: The model with its adapters.
        what: A description of the folder's content.
        library: ``"peft"`` or ``"transformers"``: the library that loads the folder.
        metrics: Results to show.
        data: A description of the training data, in one line.
        notes: Further paragraphs.

    Returns:
        Markdown with YAML front matter, which names the base model if it is on the Hub.
    """
    base = base_name(model)
    front = {"base_model": base} if _is_hub_name(base) else {}
    header = yaml.safe_dump(
        {**front, "library_name": library, "tags": ["milora", "lora"]}, sort_keys=False, allow_unicode=True
    )
    title = Path(base).name.replace("\n", " ") or type(model).__name__
    origin = f"Fine-tuned from {_code(base)}" if base else f"Fine-tuned from a {type(model).__name__} without a name"
    parts = [
        f"---\n{header}---",
        f"# {title}, fine-tuned",
        f"{origin} with milora-lightning: {what}.",
        _adapters(model),
        f"```python\n{_usage(model, library)}\n```",
        f"Trained on: {_code(data)}." if data else "",
        notes,
        table(["metric", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()]) if metrics else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_hub_name(name: str) -> bool:
    """Whether a base is given by a Hub name rather than a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).exists()


def _adapters(model: PreTrainedModel) -> str:
    layers = lora_layers(model).values()
    first = next(iter(layers))
    return (
        f"Start of the factors: {first.init}, r = {_range([a.r for a in layers])}, "
        f"lora_alpha = {_range([a.lora_alpha for a in layers])}, lora_dropout = {first.lora_dropout:g}, "
        f"{counted(sum(matrices_in(layer) or 1 for layer in layers), 'matrix', 'matrices')}."
    )


def _range(values: list[float] | list[int]) -> str:
    return f"{min(values):g}" if min(values) == max(values) else f"{min(values):g} to {max(values):g}"


def _usage(model: PreTrainedModel, library: str) -> str:
    task = task_type(model)
    if library == "peft":
        name = f"AutoPeft{TASKS[task][0].removeprefix('Auto')}" if task else "AutoPeftModel"
        name = "AutoPeftModelForFeatureExtraction" if task == "FEATURE_EXTRACTION" else name
    else:
        name = TASKS[task][0] if task else type(model).__name__
    lines = [f"from {library} import {name}", "", 'folder = "."  # where this file is']
    options = ""
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        options = f", num_labels={json.dumps(model.config.num_labels)}" if library == "peft" else ""
    lines.append(f"model = {name}.from_pretrained(folder{options})")
    return "\n".join(lines)


def _code(text: str) -> str:
    """Format text as inline code, even if it contains backticks or line breaks.

    >>> _code("a`b")
    '`` a`b ``'
    """
    line = " ".join(text.split())
    return f"`` {line} ``" if "`" in line else f"`{line}`"
