"""Loads adapters that PEFT, or this package, has exported."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_lightning.adapters.candidates import adaptable_layers
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.parts import ends_with
from milora_lightning.adapters.surgery import inject
from milora_lightning.adapters.targets import find_targets
from milora_lightning.checkpoint.fingerprint import check_base, fingerprint, unquantized
from milora_lightning.checkpoint.io import CheckpointError
from milora_lightning.config import LoRAConfig
from milora_lightning.export.models import find_model
from milora_lightning.export.peft_attention import INSIDE, TWICE, counts_twice, own_names
from milora_lightning.export.peft_format import BASE_KEY, PEFT_PREFIX, deviations, most_common, peft_module_names
from milora_lightning.export.peft_layers import as_read, from_peft, peft_shapes
from milora_lightning.export.peft_trial import opens_otherwise
from milora_lightning.parallel.dtensor import copy_into, full_tensor
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import unwrapped_name

if TYPE_CHECKING:
    from peft import LoraConfig

UNSUPPORTED = (
    "use_dora",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Initializations that do not change the base weights. Others do, and the folder does not say how."""

FACTORS = (".lora_A.weight", ".lora_B.weight")
"""Ends of the names of factors; those of nested wrappers contain a ``base_layer`` before."""

FILES = ("adapter_model.safetensors", "adapter_model.bin")


def peft_config(folder: str | Path) -> LoRAConfig:
    """Read the configuration of a PEFT LoRA folder.

    Args:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or the older ``.bin``.

    Returns:
        The configuration, with ``init="lora"`` (or ``"mica"``, of which B stays as it is), because the product of the
        folder's factors is the update itself. It
        has the layers for which the folder has factors, each with its rank and scale; an rsLoRA scale is converted to
        LoRA's.

    Raises:
        CheckpointError: If it is not such a folder, or plain LoRA layers cannot represent its adapter.
    """
    config, tensors, _ = _read(folder)
    return _as_ours(config, tensors)


def load_peft(module: nn.Module, folder: str | Path) -> LoRAConfig:
    """Load the adapters of a PEFT LoRA folder into a model, to evaluate, export or continue training.

    Modules that the folder holds in full (``modules_to_save``) are loaded too, and remain trainable.

    Args:
        module: A Hugging Face model, or a module with one inside, without adapters or with adapters of this
            configuration; changed in place.
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or the older ``.bin``.

    Returns:
        The configuration of the adapters.

    Raises:
        CheckpointError: If the folder cannot be read, its tensors do not fit the model, or PEFT itself would load it
            differently.
    """
    peft, tensors, metadata = _read(folder)
    config = _as_ours(peft, tensors)
    model = find_model(module)
    if BASE_KEY in metadata:
        saved = json.loads(metadata[BASE_KEY])
        _check_base(saved, unquantized(fingerprint(model, frozen_only=False, like=saved)))
    tensors = _without_base(model, tensors, folder)
    inside = [key for key in tensors if key.endswith(f"{INSIDE}.lora_B.weight") and bool(tensors[key].any())]
    if inside and counts_twice():
        raise CheckpointError(f"{str(folder)!r} cannot be loaded: {TWICE}, so that what it has trained is not clear.")
    stored, tensors = tensors, _by_adapter(model, config, tensors)
    _check_tensors(model, config, tensors, folder)
    names = _layer_names(tensors)
    if said := opens_otherwise(Path(folder), model, stored, {name: config.scale(name) for name in names}):
        raise CheckpointError(f"PEFT itself cannot load {str(folder)!r} into this model: {said}.")
    inject(model, config, names)
    for name, layer in lora_layers(model).items():
        layer.set_initial_factors(*_ours(layer, name, tensors, folder))
    places = _places(model)
    with torch.no_grad():
        for name, value in _whole(tensors).items():
            copy_into(places[name], value)
    return config


def _read(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor], dict[str, str]]:
    """Read configuration, tensors and metadata of a folder; refuse what plain LoRA layers cannot represent."""
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise CheckpointError(f"{str(folder)!r} is not a PEFT adapter folder: {str(error).splitlines()[0]}") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{str(folder)!r} holds a {config.peft_type} adapter, and only plain LoRA can be loaded.")
    start = config.init_lora_weights
    special = {
        "bias": config.bias != "none",
        f"init_lora_weights={start!r}": isinstance(start, str) and start not in PLAIN_STARTS,
        **{name: getattr(config, name, None) for name in UNSUPPORTED},
    }
    if used := [name for name, value in special.items() if value]:
        raise CheckpointError(
            f"{str(folder)!r} uses {', '.join(used)}, which plain LoRA layers on the unchanged base cannot represent. "
            "Merge it into its base with PEFT (merge_and_unload), and start from that model."
        )
    path = next((path for name in FILES if (path := Path(folder) / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{str(folder)!r} has neither {FILES[0]} nor {FILES[1]}.")
    try:
        if path.suffix == ".bin":
            return config, as_read(torch.load(path, map_location="cpu", weights_only=True)), {}
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return config, as_read(load_file(path)), metadata
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        said = str(error).splitlines()[0]
        raise CheckpointError(f"{str(path)!r} cannot be read: it is damaged or incomplete ({said}).") from error


def _as_ours(config: LoraConfig, tensors: dict[str, Tensor]) -> LoRAConfig:
    from peft.utils.other import get_pattern_key

    if config.target_parameters:
        return _with_parameters(config, tensors)
    places = {own: place for place, own in own_names(_layer_names(tensors)).items()}
    names = sorted(places)
    ranks = {name: tensors[_key(places[name], "lora_A")].shape[0] for name in names}
    alphas = {}
    for name in names:
        pattern = config.alpha_pattern or {}
        alpha = float(pattern.get(get_pattern_key(list(pattern), _target(places[name])), config.lora_alpha))
        alphas[name] = alpha * math.sqrt(ranks[name]) if config.use_rslora else alpha
    if not names:
        raise CheckpointError("The folder has no factors (lora_A, lora_B) of linear layers.")
    r, alpha = most_common(ranks), most_common(alphas)
    whole = {name.rpartition(".")[0] for name in _whole(tensors)}
    return LoRAConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names,
        init="mica" if config.init_lora_weights == "mica" else "lora",  # in PEFT, too, MiCA's B stays as it is
        modules_to_save=tuple(sorted(whole)),
        rank_pattern=deviations(ranks, r),
        alpha_pattern=deviations(alphas, alpha),
    )


def _with_parameters(config: LoraConfig, tensors: dict[str, Tensor]) -> LoRAConfig:
    """Return the configuration of a folder that adapts parameters, whose names only a model tells."""
    from peft.tuners.tuners_utils import check_target_module_exists

    linear = [name for name in _layer_names(tensors) if check_target_module_exists(config, name)]
    return LoRAConfig(
        r=config.r,
        lora_alpha=float(config.lora_alpha),
        target_modules=linear,
        target_parameters=sorted(config.target_parameters or ()),
        init="lora",
        use_rslora=bool(config.use_rslora),
        modules_to_save=tuple(sorted({name.rpartition(".")[0] for name in _whole(tensors)})),
        rank_pattern={_of_layer_or_weight(key): rank for key, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={_of_layer_or_weight(key): float(a) for key, a in (config.alpha_pattern or {}).items()},
    )


def _of_layer_or_weight(pattern: str) -> str:
    """Let a pattern for a layer's weight match the layer's name as well, by which its adapter is known here."""
    return f"{pattern.removesuffix('.weight')}(\\.weight)?" if pattern.endswith(".weight") else pattern


def _by_adapter(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the factors of experts by the parameters that they adapt, in place of PEFT's wrappers."""
    renamed = {}
    for place, own in own_names(_layer_names(tensors)).items():
        renamed.update({_key(place, factor): _key(own, factor) for factor in ("lora_A", "lora_B")})
    tensors = {renamed.get(key, key): value for key, value in tensors.items()}
    if not config.target_parameters:
        return tensors
    stacks = [name for name in adaptable_layers(model) if any(ends_with(name, e) for e in config.target_parameters)]
    renamed = {}
    for name, place in peft_module_names(model, stacks).items():
        renamed.update({_key(place, factor): _key(name, factor) for factor in ("lora_A", "lora_B")})
    return {renamed.get(key, key): value for key, value in tensors.items()}


def _check_tensors(model: PreTrainedModel, config: LoRAConfig, tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Refuse tensors that do not fit the layers of this model, before anything is changed."""
    layers = {**adaptable_layers(model), **lora_layers(model)}
    names = _layer_names(tensors)
    wanted: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name in layers:
            wanted |= _factor_shapes(name, layers[name], config.rank(name))
    whole = _whole(tensors)
    places = _places(model)
    wanted |= {PEFT_PREFIX + name: tuple(places[name].shape) for name in whole if name in places}
    if odd := sorted(tensors.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"The tensors in {str(folder)!r} are for other layers than this model's, such as {odd[0]!r}."
        )
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(f"{key!r} in {str(folder)!r} has shape {tuple(tensors[key].shape)}, not {shape}.")
    if more := sorted({*(find_targets(model, names) if names else ()), *lora_layers(model)} - set(names)):
        raise CheckpointError(
            f"{str(folder)!r} has no factors for {more[0]!r}, which its target_modules match as well."
        )
    for name in whole:
        others = [n for n, p in places.items() if p is places[name] and n not in whole]
        if others:
            raise CheckpointError(
                f"{str(folder)!r} holds {name!r} in full, which is tied to {others[0]!r} in this model: training would "
                "change both. Untie them (tie_word_embeddings=False), or merge the adapter with PEFT and start there."
            )


def _check_base(saved: dict[str, str], here: dict[str, str]) -> None:
    """Compare weights of equal shape and dtype only: the same base may be used in another precision."""
    alike = [name for name, value in saved.items() if here.get(name, "").rpartition(" ")[0] == value.rpartition(" ")[0]]
    check_base({name: saved[name] for name in alike}, {name: here[name] for name in alike})


def _without_base(model: PreTrainedModel, tensors: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """Remove copies of base weights, which PEFT adds when embeddings or the head have adapters."""
    kept = {}
    for key, value in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        if ".base_layer." not in name or name.endswith(FACTORS):
            kept[key] = value
            continue
        own = _places(model)
        weight = own.get(name, own.get(name.replace(".base_layer.", ".")))
        own_value = None if weight is None else full_tensor(weight.detach()).cpu()
        if own_value is None or own_value.shape != value.shape or not torch.equal(value.to(own_value.dtype), own_value):
            raise CheckpointError(
                f"{str(folder)!r} holds another {name!r} than this model, as after resizing its embeddings: merge "
                "the adapter into its base with PEFT (merge_and_unload), and start from that model."
            )
    return kept


def _places(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by the plain model's names; tied ones under each of their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {unwrapped_name(name): tensor for name, tensor in named}


def _factor_shapes(name: str, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
    of_A, of_B = peft_shapes(layer.base_layer if isinstance(layer, LoRALinear) else layer, r)
    return {_key(name, "lora_A"): of_A, _key(name, "lora_B"): of_B}


def _ours(layer: LoRALinear, name: str, tensors: dict[str, Tensor], folder: str | Path) -> tuple[Tensor, Tensor]:
    try:
        return from_peft(layer, *(tensors[_key(name, factor)] for factor in ("lora_A", "lora_B")))
    except InvalidInputError as error:
        raise CheckpointError(f"{str(folder)!r} cannot be loaded: of {name!r}, {error}.") from error


def _target(place: str) -> str:
    """Return the name of the layer that a pattern of PEFT's has to match, for what is inside it, too."""
    return place.removesuffix(INSIDE)


def _layer_names(tensors: dict[str, Tensor]) -> list[str]:
    end = ".lora_A.weight"
    return sorted(key.removeprefix(PEFT_PREFIX).removesuffix(end) for key in tensors if key.endswith(end))


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of modules that a folder holds in full, by their names in the model."""
    inside = ".base_layer."
    return {k.removeprefix(PEFT_PREFIX): v for k, v in tensors.items() if not k.endswith(FACTORS) and inside not in k}


def _key(name: str, factor: str) -> str:
    return f"{PEFT_PREFIX}{name}.{factor}.weight"
