"""PEFT's description of an export: its task type, configuration and names of layers."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from milora_lightning.adapters.experts import AdaptedExperts, LoRAExperts, stacked_weights
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.linear_layers import is_conv1d
from milora_lightning.adapters.parts import ends_with, modules_by_name
from milora_lightning.export.peft_attention import attentions, place_in_peft, target_of
from milora_lightning.utils.names import pristine_name, unwrapped_name
from milora_lightning.utils.patterns import Value

if TYPE_CHECKING:
    from peft import LoraConfig

BASE = "base_layer"
"""Attribute of the wrapped layer, both in PEFT's layers and in this package's."""


BASE_KEY = "milora_lightning.base"
"""Metadata entry of an exported file with the fingerprint of its base."""

PEFT_PREFIX = "base_model.model."
"""Prefix of layer names in PEFT."""

TASKS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "CAUSAL_LM": ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "SEQ_CLS": ("AutoModelForSequenceClassification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "TOKEN_CLS": ("AutoModelForTokenClassification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    "FEATURE_EXTRACTION": ("AutoModel", auto.MODEL_MAPPING_NAMES),
}
"""PEFT's task types, and the class of transformers that loads the base model of each."""

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Endings of the names of modules that PEFT always stores in full for a task."""

MERGED = "Use the merged format (export_merged, --format merged), which works for every model."


def task_type(model: PreTrainedModel) -> str | None:
    """Return PEFT's task type of a model: the one whose Auto class loads the model's class from its base.

    It is None for all other models, such as those for speech and vision: PEFT's task classes expect text.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> tiny = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    >>> task_type(T5ForConditionalGeneration(tiny))
    'SEQ_2_SEQ_LM'
    """
    parameters = inspect.signature(model.forward).parameters
    if model.main_input_name != "input_ids" or not {"input_ids", "inputs_embeds"} <= parameters.keys():
        return None
    classes = {each.__name__ for each in type(model).__mro__}
    remote = getattr(model.config, "auto_map", None) or {}
    for task, (auto_class, names) in TASKS.items():
        listed = [names.get(model.config.model_type), remote.get(auto_class)]
        flat = {name.rpartition(".")[2] for entry in listed for name in _strings(entry)}
        if classes & flat:
            return task
    return None


def _strings(entry: Any) -> Iterable[str]:
    return (entry,) if isinstance(entry, str) else (name for name in entry or () if isinstance(name, str))


def lora_config(
    model: PreTrainedModel,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    kept: list[str],
    by_weight: Collection[str] = (),
) -> LoraConfig:
    """Return the PEFT configuration of adapters.

    Args:
        model: The model with its adapters.
        ranks: Rank of each adapter in the folder.
        alphas: ``lora_alpha`` of each; its scale is ``lora_alpha`` over its rank.
        kept: Names of modules that the folder stores in full.
        by_weight: Layers that must be named by their weight, as a parameter; see :func:`tried`.

    Returns:
        The configuration, with patterns for the layers that differ from most others.
    """
    from peft import LoraConfig  # here and below when it is used: it takes seconds to import

    layers = lora_layers(model)
    ranks, alphas = {n: ranks[n] for n in layers if n in ranks}, {n: alphas[n] for n in layers if n in alphas}
    parameters = {
        n: f"{n}.weight" if n in by_weight else n for n in ranks if _is_parameter(layers[n]) or n in by_weight
    }
    named = target_of(model, ranks)
    linear = list(dict.fromkeys(named[name] for name in ranks if name not in parameters))
    first = next(iter(layers.values()))
    patterns = {**named, **parameters}
    r, alpha = most_common(ranks), most_common(alphas)
    task = task_type(model)
    return LoraConfig(
        r=r,
        lora_alpha=whole(alpha),  # type: ignore[arg-type]
        rank_pattern={patterns[n]: value for n, value in deviations(ranks, r).items()},
        alpha_pattern={patterns[n]: whole(value) for n, value in deviations(alphas, alpha).items()},
        lora_dropout=0.0 if parameters else first.lora_dropout,  # PEFT does not support it for parameters
        target_modules=target_modules(model, linear) if linear else None,
        target_parameters=target_parameters(model, list(parameters.values())) if parameters else None,
        modules_to_save=kept or None,
        base_model_name_or_path=base_name(model),
        fan_in_fan_out=any(is_conv1d(layer.base_layer) for layer in layers.values()) and not parameters,
        task_type=task,
        auto_mapping=None
        if task
        else {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        inference_mode=True,
    )


def base_name(model: PreTrainedModel) -> str:
    """Return the Hub name or the absolute path of the base, so that it is found from any working directory."""
    name = str(model.config.name_or_path)
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.exists() else name


def target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Return the last parts of the adapters' names if they match only these layers, otherwise the full names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    bases = {layer.base_layer for layer in lora_layers(model).values()}
    meant = {
        name
        for name, child in ((unwrapped_name(wrapped_name), child) for wrapped_name, child in model.named_modules())
        if child not in bases
        and name.rsplit(".", 1)[-1] in endings
        and not (isinstance(child, nn.ModuleList) or _is_parameter(child))
    }
    return endings if meant == set(names) else names


def target_parameters(model: nn.Module, names: list[str]) -> list[str]:
    """Return the last two parts of the stacks' names if they match only these parameters, otherwise the full names."""
    endings = sorted({".".join(name.split(".")[-2:]) for name in names})
    parameters = {pristine_name(name) for name, _ in model.named_parameters()} | stacked_weights(model).keys()
    meant = {name for name in parameters for ending in endings if ends_with(name, ending)}
    return endings if meant == set(names) else names


def _is_parameter(layer: nn.Module) -> bool:
    return isinstance(layer, LoRAExperts)


def peft_module_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the name of the module in which PEFT keeps each adapter's factors.

    For parameters of one module, PEFT nests wrappers, the innermost for the first parameter.

    Args:
        model: The model, with or without adapters.
        names: The adapters' names.
    """
    names = list(names)
    modules, found = modules_by_name(model), {}
    owners = attentions(model, names)
    for name in names:
        holder, _, parameter = name.rpartition(".")
        experts = modules.get(holder)
        experts = experts.base_layer if isinstance(experts, AdaptedExperts) else experts
        if experts is None or experts._parameters.get(parameter) is None or experts._modules.get(parameter) is not None:
            found[name] = place_in_peft(name, owners)
            continue
        behind = list(experts._parameters)[list(experts._parameters).index(parameter) + 1 :]
        found[name] = holder + f".{BASE}" * sum(f"{holder}.{other}" in names for other in behind)
    return found


def most_common(values: Mapping[str, Value]) -> Value:
    """Return the value that most names have."""
    return Counter(values.values()).most_common(1)[0][0]


def deviations(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Return the values that differ from a default, long names first, because PEFT takes the first match.

    Names match the ends of others: a layer whose name ends in that of a layer with another value is listed, too.

    >>> deviations({"fc": 2, "block.fc": 4, "block.up": 4}, 4)
    {'block.fc': 4, 'fc': 2}
    """
    odd = {name for name, value in values.items() if value != default}
    named = (name for name in values if name in odd or any(name[dot + 1 :] in odd for dot in _dots(name)))
    return {name: values[name] for name in sorted(named, key=len, reverse=True)}


def _dots(name: str) -> list[int]:
    return [place for place, character in enumerate(name) if character == "."]


def whole(value: float) -> float:
    """Return a number as an integer if it is one, as is usual in configurations.

    >>> whole(16.0), whole(2.5)
    (16, 2.5)
    """
    return int(value) if float(value).is_integer() else value
