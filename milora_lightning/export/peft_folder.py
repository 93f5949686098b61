"""Reading a PEFT LoRA folder: its tensors, and its configuration converted to this package's."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from milora_lightning.checkpoint.io import CheckpointError
from milora_lightning.config import LoRAConfig
from milora_lightning.export.peft_attention import INSIDE, own_names
from milora_lightning.export.peft_format import PEFT_PREFIX, deviations, most_common
from milora_lightning.export.peft_layers import as_read

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
"""Initializations that do not change the base weights. Others do, in a way that the folder does not specify."""

FACTORS = (".lora_A.weight", ".lora_B.weight")
"""Endings of the names of factors; in nested wrappers, these are preceded by ``base_layer``."""

FILES = ("adapter_model.safetensors", "adapter_model.bin")


def read_folder(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor], dict[str, str]]:
    """Read configuration, tensors and metadata of a folder; refuse adapters that plain LoRA layers cannot represent."""
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


def as_ours(config: LoraConfig, tensors: dict[str, Tensor]) -> LoRAConfig:
    """Convert the configuration of a folder to this package's.

    Raises:
        CheckpointError: If it has no factors.
    """
    from peft.utils.other import get_pattern_key

    if config.target_parameters:
        return _with_parameters(config, tensors)
    places = {name: place for place, name in own_names(layer_names(tensors)).items()}
    names = sorted(places)
    ranks = {name: tensors[factor_key(places[name], "lora_A")].shape[0] for name in names}
    alphas = {}
    for name in names:
        pattern = config.alpha_pattern or {}
        alpha = float(pattern.get(get_pattern_key(list(pattern), _target(places[name])), config.lora_alpha))
        alphas[name] = alpha * math.sqrt(ranks[name]) if config.use_rslora else alpha
    if not names:
        raise CheckpointError("The folder has no factors (lora_A, lora_B) of linear layers.")
    r, alpha = most_common(ranks), most_common(alphas)
    whole = {name.rpartition(".")[0] for name in in_full(tensors)}
    return LoRAConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names,
        init="mica" if config.init_lora_weights == "mica" else "lora",  # in PEFT, too, MiCA's B is frozen
        modules_to_save=tuple(sorted(whole)),
        rank_pattern=deviations(ranks, r),
        alpha_pattern=deviations(alphas, alpha),
    )


def _with_parameters(config: LoraConfig, tensors: dict[str, Tensor]) -> LoRAConfig:
    """Convert the configuration of a folder that adapts parameters; their names depend on the model."""
    from peft.tuners.tuners_utils import check_target_module_exists

    linear = [name for name in layer_names(tensors) if check_target_module_exists(config, name)]
    return LoRAConfig(
        r=config.r,
        lora_alpha=float(config.lora_alpha),
        target_modules=linear,
        target_parameters=sorted(config.target_parameters or ()),
        init="lora",
        use_rslora=bool(config.use_rslora),
        modules_to_save=tuple(sorted({name.rpartition(".")[0] for name in in_full(tensors)})),
        rank_pattern={_of_layer_or_weight(key): rank for key, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={_of_layer_or_weight(key): float(a) for key, a in (config.alpha_pattern or {}).items()},
    )


def _of_layer_or_weight(pattern: str) -> str:
    """Make a pattern for a layer's weight also match the layer's name, which is the name of its adapter here."""
    return f"{pattern.removesuffix('.weight')}(\\.weight)?" if pattern.endswith(".weight") else pattern


def _target(place: str) -> str:
    """Return the name that PEFT's patterns must match, which for layers inside an attention is the attention's."""
    return place.removesuffix(INSIDE)


def layer_names(tensors: dict[str, Tensor]) -> list[str]:
    """Return PEFT's names of the layers whose factors a folder contains."""
    end = ".lora_A.weight"
    return sorted(key.removeprefix(PEFT_PREFIX).removesuffix(end) for key in tensors if key.endswith(end))


def in_full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of modules that a folder stores in full, by their names in the model."""
    inside = ".base_layer."
    return {k.removeprefix(PEFT_PREFIX): v for k, v in tensors.items() if not k.endswith(FACTORS) and inside not in k}


def factor_key(name: str, factor: str) -> str:
    """Return the key of a layer's factor in a folder's file."""
    return f"{PEFT_PREFIX}{name}.{factor}.weight"
