"""Starting from an adapter that PEFT, or this package, has exported."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import nn

from milora_lightning.checkpoint import CheckpointError
from milora_lightning.config import LoRAConfig
from milora_lightning.export import find_model
from milora_lightning.surgery import inject, lora_layers

PREFIX = "base_model.model."


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
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": config.modules_to_save,
        "bias": config.bias != "none",
        "layers_to_transform": config.layers_to_transform,
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
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} has no adapter_model.safetensors.")
    tensors = load_file(path)
    inject(module, config)
    layers = lora_layers(find_model(module))
    expected = {f"{PREFIX}{name}.{factor}.weight" for name in layers for factor in ("lora_A", "lora_B")}
    if tensors.keys() != expected:
        odd = sorted(tensors.keys() ^ expected)
        raise CheckpointError(
            f"The tensors in {str(path)!r} are for other layers than this model's, such as {odd[0]!r}."
        )
    for name, layer in layers.items():
        A, B = (tensors[f"{PREFIX}{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        if A.shape != layer.lora_A.shape or B.shape != layer.lora_B.shape:
            raise CheckpointError(f"The factors of {name!r} in {str(path)!r} do not have the shapes of this model's.")
    for name, layer in layers.items():
        A, B = (tensors[f"{PREFIX}{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        layer.set_initial_factors(A, B)
    return config
