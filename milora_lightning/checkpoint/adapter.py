"""Checkpoints that hold the adapters and what else was trained, never the base model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_lightning.adapters.injection import base_keys, inject, lora_layers
from milora_lightning.adapters.layer import INITIALIZED, LoRALinear
from milora_lightning.checkpoint.fingerprint import check_base, fingerprint
from milora_lightning.checkpoint.io import KEY, CheckpointError, read
from milora_lightning.config import LoRAConfig, first_difference
from milora_lightning.parallel.dtensor import is_sharded
from milora_lightning.utils.names import key_in, rename_keys, unwrapped_name

FORMAT = 1


class AdapterCheckpoint:
    """Makes a module's state dict hold its adapters only, and checks those it loads.

    Attached to a LightningModule, it acts in every way Lightning saves and loads: the base model's weights are left
    out, and the configuration of the adapters and a fingerprint of the base travel with them. Loading is all or
    nothing: a state dict of another base, rank, start or set of targets is refused before anything is copied. What
    the module trains beside the adapters, and its buffers, are kept.

    Args:
        module: The module whose state dict is meant, with adapters injected.
        config: The configuration of its adapters.
    """

    def __init__(self, module: nn.Module, config: LoRAConfig) -> None:
        self.config = config
        self.prefix = ""  # of the module's keys in the state dict that is being loaded
        # Taken now, before a strategy casts or moves the weights, so that it is the same when loading; or else when
        # there are weights.
        self.fingerprint = None if any(p.is_meta for p in module.parameters()) else fingerprint(module)

    def base(self, module: nn.Module) -> dict[str, str]:
        """Return the fingerprint of the module's base; where weights are sharded, all ranks must call this."""
        if self.fingerprint is None:
            self.fingerprint = fingerprint(module)
        return self.fingerprint

    @staticmethod
    def of(module: nn.Module | None) -> AdapterCheckpoint | None:
        """Return what is attached to a module, if it is one and something is."""
        attached = getattr(module, "_adapter_checkpoint", None)
        return attached if isinstance(attached, AdapterCheckpoint) else None

    @staticmethod
    def attach(module: nn.Module, config: LoRAConfig) -> AdapterCheckpoint:
        """Attach to a module, unless that has been done; return what is attached."""
        attached = AdapterCheckpoint.of(module)
        if attached is not None:
            attached.config = config
        else:
            attached = AdapterCheckpoint(module, config)
            module._adapter_checkpoint = attached  # type: ignore[assignment]
            module.register_state_dict_post_hook(_drop_base)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(_check)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_post_hook(_excuse_base)  # type: ignore[no-untyped-call]
        return attached

    def trim(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Take the base out of a state dict, and put the description in."""
        in_base = _base_predicate(module)
        for key in [key for key in state if key.startswith(prefix)]:
            if in_base(key.removeprefix(prefix)):
                del state[key]
        if not is_sharded(module):  # torch collects the state dict of sharded weights, and renames them itself
            rename_keys(state, prefix, unwrapped_name)
        state[prefix + KEY] = self.description(module)

    def description(self, module: nn.Module) -> dict[str, Any]:
        """Describe the adapters and their base, in primitives."""
        return {
            "format": FORMAT,
            "version": version("milora-lightning"),
            "config": {**asdict(self.config), "target_modules": _as_primitive(self.config.target_modules)},
            "adapters": list(lora_layers(module)),
            "uninitialized": [name for name, layer in lora_layers(module).items() if not layer.initialized],
            "base": self.base(module),
        }

    def check(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Refuse a state dict that does not fit the module; take the description out of one that does."""
        self.prefix = prefix
        description = state.pop(prefix + KEY, None)
        names = {prefix + unwrapped_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
        if description is None and names <= state.keys():
            return  # a whole state dict brings everything
        self.check_description(module, description)
        kept = {prefix + unwrapped_name(key): value for key, value in module.state_dict().items() if key != KEY}
        own = {key: value for key, value in state.items() if key.startswith(prefix)}
        check_tensors(own, {key: getattr(value, "shape", None) for key, value in kept.items()}, names)
        for name, initialized in told_initialized(description).items():
            state[f"{prefix}{name}.{INITIALIZED}"] = initialized

    def check_description(self, module: nn.Module, description: dict[str, Any] | None) -> None:
        """Refuse adapters of another configuration or base, or none at all.

        Raises:
            CheckpointError: If they are that.
        """
        if description is None:
            raise CheckpointError(
                "The checkpoint holds no adapters: it was saved without MiLoRAInit. Load it into the module before "
                "fitting with MiLoRAInit, not through ckpt_path."
            )
        check_format(description)
        self._check_config(description, lora_layers(module))
        check_base({unwrapped_name(name): value for name, value in description["base"].items()}, self.base(module))

    def _check_config(self, description: dict[str, Any], layers: dict[str, LoRALinear]) -> None:
        saved = LoRAConfig(**description["config"])
        adapters = {unwrapped_name(name) for name in description["adapters"]}
        for layer in layers.keys() & adapters:
            here, there = self.config.settings(layer), saved.settings(layer)
            if key := first_difference(here, there, ignore=("lora_dropout",)):  # dropout may change during training
                raise CheckpointError(
                    f"The checkpoint's adapters have {key}={there[key]}, this run's have {key}={here[key]}, as on "
                    f"{layer!r}. Use the configuration the checkpoint was trained with, or start without it."
                )
        missing, extra = sorted(layers.keys() - adapters), sorted(adapters - layers.keys())
        if missing or extra:
            raise CheckpointError(
                f"The checkpoint's adapters are on other layers: it has none for {_some(missing)} and has some for "
                f"{_some(extra)}, compared with this run's target_modules. Use those it was trained with: "
                f"{saved.target_modules}."
            )


# torch wants plain functions as hooks.
def _drop_base(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    module._adapter_checkpoint.trim(module, state, prefix)  # type: ignore[operator, union-attr]


def _check(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # Names with and without what torch.compile puts into them fit, whoever of writer and reader has compiled what.
    rename_keys(state, prefix, unwrapped_name)
    module._adapter_checkpoint.check(module, state, prefix)  # type: ignore[operator, union-attr]
    rename_keys(state, prefix, key_in(module))


def _excuse_base(module: nn.Module, incompatible: Any) -> None:
    in_base, prefix = _base_predicate(module), str(module._adapter_checkpoint.prefix)  # type: ignore[union-attr]
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not (key.startswith(prefix) and in_base(key.removeprefix(prefix)))
    ]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint that holds adapters, without running any code in it.

    Args:
        path: A checkpoint: a file, or the folder of a sharded run.

    Returns:
        Its content; adapters and other trained weights are under ``"state_dict"``.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it is damaged, no checkpoint, holds no adapters, or is from a newer version.
    """
    checkpoint = read(path)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{str(path)!r} is no Lightning checkpoint: it has no state_dict.")
    if KEY not in state:
        raise CheckpointError(
            f"{str(path)!r} holds no adapters: it was saved without MiLoRAInit. If all weights were trained, give "
            "fit, validate, test and predict --config method/full.yaml as in training."
        )
    check_format(state[KEY])
    return checkpoint


def told_initialized(description: Mapping[str, Any] | None) -> dict[str, bool]:
    """Tell which adapters had their initial values when they were described; nothing if that was not noted then."""
    if description is None or "uninitialized" not in description:
        return {}
    without = {unwrapped_name(name) for name in description["uninitialized"]}
    return {name: name not in without for name in map(unwrapped_name, description["adapters"])}


def check_format(description: dict[str, Any]) -> None:
    """Refuse adapters written by a newer version of the package.

    Raises:
        CheckpointError: If they are.
    """
    if description["format"] > FORMAT:
        raise CheckpointError(
            f"The adapters were saved by a newer version of milora-lightning (format {description['format']}, this "
            f"version reads up to {FORMAT}). Upgrade: pip install --upgrade milora-lightning"
        )


def check_tensors(
    state: Mapping[str, Any], shapes: Mapping[str, torch.Size | None], optional: Collection[str] = ()
) -> None:
    """Refuse a state dict without exactly the tensors that a module keeps.

    Args:
        state: The state dict.
        shapes: The shape of each entry that has to be there; None for what is no tensor.
        optional: Further entries that may be there.

    Raises:
        CheckpointError: If something is missing, in excess, or of another shape.
    """
    missing, extra = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys() - set(optional))
    if missing or extra:
        raise CheckpointError(
            f"The checkpoint lacks {_some(missing)} and has {_some(extra)} in excess, compared with this module."
        )
    for key, shape in shapes.items():
        if shape is not None and state[key].shape != shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(state[key].shape)} in the checkpoint and {tuple(shape)} here."
            )


def load_adapter(module: nn.Module, path: str | Path) -> LoRAConfig:
    """Put the adapters of a checkpoint on a module that has none, or load them into those it has.

    Args:
        module: The LightningModule the checkpoint is of, with its model built; changed in place.
        path: A checkpoint written by a Trainer with ``MiLoRAInit``.

    Returns:
        The configuration of the adapters.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read, or does not fit the module.
    """
    state = read_checkpoint(path)["state_dict"]
    config = inject_as_in(module, state)
    module.load_state_dict(state)
    return config


def inject_as_in(module: nn.Module, state: dict[str, Any]) -> LoRAConfig:
    """Inject the adapters that a state dict describes, without their values."""
    check_format(state[KEY])
    # What was injected, by whichever configurations.
    config = replace(LoRAConfig(**state[KEY]["config"]), target_modules=state[KEY]["adapters"])
    inject(module, config, state[KEY]["adapters"])
    AdapterCheckpoint.attach(module, config)
    return config


def _base_predicate(module: nn.Module) -> Callable[[str], bool]:
    """Tell which keys of a state dict belong to the base, and are in no checkpoint.

    These are the frozen parameters, and what goes with them without being a parameter or buffer itself, such as the
    scales of a quantized weight. Adapters, whatever else trains, buffers and extra states are kept.
    """
    base = {unwrapped_name(key) for key in base_keys(module)}
    holders = {key.rpartition(".")[0] for key in base}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    kept = {unwrapped_name(name) for name, _ in named} - base

    def in_base(key: str) -> bool:
        key = unwrapped_name(key)
        if key in kept or key.endswith("_extra_state"):
            return False
        parts = key.split(".")
        of_a_weight = any(".".join(parts[:n]) in base for n in range(1, len(parts) + 1))  # "weight", "weight.absmax"
        return of_a_weight or key.rpartition(".")[0] in holders  # "SCB", beside the weight

    return in_base


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _as_primitive(target_modules: Any) -> Any:
    return target_modules if isinstance(target_modules, str) else list(target_modules)
