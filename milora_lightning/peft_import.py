"""Starting from an adapter that PEFT, or this package, has exported."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from milora_lightning.checkpoint_io import CheckpointError
from milora_lightning.config import LoRAConfig
from milora_lightning.export import BASE_KEY, find_model
from milora_lightning.fingerprint import check_base, fingerprint
from milora_lightning.lora import LoRALinear, linear_shape
from milora_lightning.peft_format import PEFT_PREFIX
from milora_lightning.surgery import inject, lora_layers
from milora_lightning.targets import find_targets

UNSUPPORTED = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "lora_bias",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


def peft_config(folder: str | Path) -> LoRAConfig:
    """Read the configuration of a PEFT LoRA folder.

    Args:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The configuration, with ``init="lora"``: the folder's factors are the update themselves.

    Raises:
        CheckpointError: If it is no such folder, or an adapter of a kind that plain LoRA layers cannot hold.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise CheckpointError(f"{str(folder)!r} is no PEFT adapter folder: {str(error).splitlines()[0]}") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{str(folder)!r} holds a {config.peft_type} adapter; only plain LoRA can be continued.")
    special = {
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "bias": config.bias != "none",
        # a start that has changed the base's weights: the folder alone does not say how
        "init_lora_weights": isinstance(config.init_lora_weights, str)
        and config.init_lora_weights not in ("gaussian", "eva", "orthogonal"),
        **{name: getattr(config, name, None) for name in UNSUPPORTED},
    }
    used = [name for name, value in special.items() if value]
    if used:
        raise CheckpointError(f"{str(folder)!r} uses {', '.join(used)}, which plain LoRA layers cannot hold.")
    targets = config.target_modules
    return LoRAConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else sorted(targets or []),
        init="lora",
    )


def load_peft(module: nn.Module, folder: str | Path) -> LoRAConfig:
    """Put the adapters of a PEFT LoRA folder on a model, ready to evaluate, export or train on.

    Args:
        module: A Hugging Face model, or a module with one inside, without adapters or with adapters of this
            configuration; changed in place.
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The configuration of the adapters.

    Raises:
        CheckpointError: If the folder cannot be read, or its tensors do not fit the model.
    """
    config = peft_config(folder)
    model = find_model(module)
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} has no adapter_model.safetensors.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: it is damaged or incomplete ({error}).") from error
    if BASE_KEY in metadata:
        _check_base(json.loads(metadata[BASE_KEY]), fingerprint(model, frozen_only=False))
    targets = {**find_targets(model, config.target_modules), **lora_layers(model)}
    expected = {
        f"{PEFT_PREFIX}{name}.{factor}.weight": shape
        for name, layer in targets.items()
        for factor, shape in zip(("lora_A", "lora_B"), _factor_shapes(layer, config.r), strict=True)
    }
    odd = sorted(tensors.keys() ^ expected.keys())
    if odd:
        raise CheckpointError(
            f"The tensors in {str(path)!r} are for other layers than this model's, such as {odd[0]!r}."
        )
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise CheckpointError(f"{key!r} in {str(path)!r} has shape {tuple(tensors[key].shape)}, not {shape}.")
    inject(model, config)
    for name, layer in lora_layers(model).items():
        layer.set_initial_factors(*(tensors[f"{PEFT_PREFIX}{name}.{factor}.weight"] for factor in ("lora_A", "lora_B")))
    return config


def _check_base(saved: dict[str, str], here: dict[str, str]) -> None:
    """Compare the weights of equal shape and dtype: an adapter may go to the same base in another precision."""
    alike = [name for name, value in saved.items() if here.get(name, "").rpartition(" ")[0] == value.rpartition(" ")[0]]
    check_base({name: saved[name] for name in alike}, {name: here[name] for name in alike})


def _factor_shapes(layer: nn.Module, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    base = layer.base_layer if isinstance(layer, LoRALinear) else layer
    out_features, in_features = linear_shape(base)
    return (r, in_features), (out_features, r)
