"""PEFT's view of an export: its task type, its target layers, and whether it loads as it was trained."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from milora_lightning.adapters.experts import AdaptedExperts, LoRAExperts, stacked_weights
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_adaptable, is_conv1d
from milora_lightning.adapters.parts import ends_with, modules_by_name
from milora_lightning.export.peft_attention import attentions, own_names, place_in_peft, target_of, with_partners
from milora_lightning.export.peft_layers import objection_to_layers
from milora_lightning.export.skeleton import skeleton
from milora_lightning.utils.counting import counted
from milora_lightning.utils.names import pristine_name, unwrapped_name
from milora_lightning.utils.patterns import Value

if TYPE_CHECKING:
    from peft import LoraConfig

BASE = "base_layer"
"""Name under which a layer of PEFT, as of this package, holds what it wraps."""

EXPERTS_BEFORE = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Names of the layers of experts and routers in transformers 4."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before a layer's name."""

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
"""Endings of the names of modules that PEFT always saves in full for a task."""

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
        kept: Names of modules that the folder holds in full.
        by_weight: Layers that are named by their weight, a parameter, as :func:`tried` says.

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
        lora_alpha=_whole(alpha),  # type: ignore[arg-type]
        rank_pattern={patterns[n]: value for n, value in deviations(ranks, r).items()},
        alpha_pattern={patterns[n]: _whole(value) for n, value in deviations(alphas, alpha).items()},
        lora_dropout=0.0 if parameters else first.lora_dropout,  # which PEFT does not have for parameters
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
    """Return the Hub name or the absolute path of the base, so that it is found from every working directory."""
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


def objection(model: PreTrainedModel) -> str | None:
    """Return the reason why PEFT cannot put adapters on the same layers; None if it can."""
    return tried(model)[0]


def tried(model: PreTrainedModel) -> tuple[str | None, frozenset[str]]:
    """Inject adapters by PEFT into a copy of the model without weights.

    In models with stacked experts, PEFT may take the names of other layers (``shared_expert.down_proj``) for those that
    experts had in transformers 4. It still finds these layers as parameters, by the names of their weights.

    Returns:
        The reason why PEFT cannot put adapters on the same layers, None if it can; and the layers that have to be named
        by their weights.
    """
    said = _objection(model, frozenset())
    if said is None or not _has_stacks(model):
        return said, frozenset()
    layers = lora_layers(model).items()
    named = frozenset(n for n, m in layers if n.rpartition(".")[2] in EXPERTS_BEFORE and not _is_parameter(m))
    return (_objection(model, named), named) if named else (said, named)


def _objection(model: PreTrainedModel, by_weight: frozenset[str]) -> str | None:
    layers = lora_layers(model)
    if len({id(m) for m in layers.values()}) < len(registrations(model)):
        return "a layer with an adapter is used in several places of the model, which PEFT does not support"
    if said := objection_to_layers(model):
        return said
    from peft import inject_adapter_in_model

    ranks = {name: layer.r for name, layer in layers.items()}
    config = lora_config(model, ranks, ranks, [], by_weight)
    base = skeleton(model)
    try:
        with _quiet():
            opened = inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
    except Exception as error:  # whatever PEFT raises is its objection
        return _said(error)
    return _other_layers(opened, with_partners(model, layers))


def outermost_models(module: nn.Module) -> dict[str, PreTrainedModel]:
    """Return the Hugging Face models in a module by name, except those inside other models."""
    models: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(
            not outer or name.startswith(f"{outer}.") for outer in models
        ):
            models[name] = child
    return models


def registrations(model: nn.Module) -> dict[str, LoRALinear]:
    """Return adapters by all of their names; an adapter that is used in several places has several names."""
    modules = model.named_modules(remove_duplicate=False)
    return {unwrapped_name(name): layer for name, layer in modules if isinstance(layer, LoRALinear)}


def opens_otherwise(
    folder: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor], scales: Mapping[str, float]
) -> str | None:
    """Load a folder by PEFT into a copy of the model without weights, and say how it differs from what is intended.

    Args:
        folder: The complete folder.
        model: The model, with or without adapters.
        tensors: The tensors in the file: factors, and those of modules that are saved in full.
        scales: The scale of each adapter by name.

    Returns:
        The difference: PEFT refuses the folder, or finds other layers, tensors or scales. None if there is none.
    """
    from peft import PeftModel

    try:
        with _quiet():
            wrapped = PeftModel.from_pretrained(
                skeleton(model), str(folder), low_cpu_mem_usage=True, torch_device="cpu"
            )
        opened = wrapped.get_base_model()
        return _other_layers(opened, scales) or _other_tensors(opened, tensors) or _other_scales(opened, scales)
    except Exception as error:  # whatever PEFT raises is its objection
        return _said(error)


def _other_layers(opened: nn.Module, names: Iterable[str]) -> str | None:
    wanted, found = set(names), set(_peft_layers(opened))
    if missing := sorted(wanted - found):
        return f"it leaves out the adapters of {counted(len(missing), 'layer')}, such as {missing[0]!r}"
    if extra := sorted(found - wanted):
        return f"it adapts {counted(len(extra), 'more layer')}, such as {extra[0]!r}"
    return None


def _other_tensors(opened: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    from peft.utils import ModulesToSaveWrapper

    found = {}
    for name, layer in _modules_of_peft(opened).items():
        for factor in ("lora_A", "lora_B"):
            of_embedding = getattr(layer, factor.replace("lora_", "lora_embedding_"), {})
            key = f"{PEFT_PREFIX}{name}.{factor}.weight"
            found[key] = of_embedding["default"] if of_embedding else getattr(layer, factor)["default"].weight
    for name, module in opened.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            state = module.modules_to_save["default"].state_dict()
            found |= {f"{PEFT_PREFIX}{name}.{key}": value for key, value in state.items()}
    if odd := sorted(found.keys() ^ tensors.keys()):
        return f"it {'does not read' if odd[0] in tensors else 'misses'} the tensor {odd[0]!r}"
    if unread := [key for key, value in found.items() if value.is_meta]:  # under another name, for example
        return f"it does not read the tensor {unread[0]!r}"
    different = [key for key, value in found.items() if not _alike(value, tensors[key])]
    return f"it reads {different[0]!r} as another tensor" if different else None


def _other_scales(opened: nn.Module, scales: Mapping[str, float]) -> str | None:
    for name, layer in _peft_layers(opened).items():
        if not math.isclose(layer.scaling["default"], scales[name], rel_tol=1e-6):
            return f"it scales {name!r} by {layer.scaling['default']:g}, not {scales[name]:g}"
    return None


def _peft_layers(opened: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers by the names that their adapters have here."""
    layers = {}
    for name, module in _modules_of_peft(opened).items():
        parameter = getattr(module, "parameter_name", None)  # of a ParamWrapper; they are nested
        by_weight = parameter == "weight" and is_adaptable(module.get_base_layer())
        layers[name if parameter is None or by_weight else f"{_without_wrappers(name)}.{parameter}"] = module
    return {own: layers[place] for place, own in own_names(layers).items()}


def _modules_of_peft(opened: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in opened.named_modules() if isinstance(module, BaseTunerLayer)}


def _is_parameter(layer: nn.Module) -> bool:
    return isinstance(layer, LoRAExperts)


def _has_stacks(model: nn.Module) -> bool:
    return bool(stacked_weights(model)) or any(isinstance(child, LoRAExperts) for child in model.modules())


def _without_wrappers(name: str) -> str:
    return name.replace(f".{BASE}", "")


def peft_module_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the name of the module in which PEFT keeps each adapter's factors.

    For parameters of a module PEFT puts one wrapper around another, the innermost for the first of the parameters.

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


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().float(), other.detach().float().cpu())


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this context, PEFT's layers are created without warnings and without changing the random state."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        yield


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")


def most_common(values: Mapping[str, Value]) -> Value:
    """Return the value that most names have."""
    return Counter(values.values()).most_common(1)[0][0]


def deviations(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Return the values that differ from a default, long names first, because PEFT takes the first match."""
    return {n: v for n, v in sorted(values.items(), key=lambda item: -len(item[0])) if v != default}


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value
