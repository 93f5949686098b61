"""Checkpoints that hold the adapters and other trained weights, but never the base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from milora_lightning.adapters.adapter_state import INITIALIZED
from milora_lightning.adapters.freezing import base_keys
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.new_layers import saved_names
from milora_lightning.adapters.parts import find_part
from milora_lightning.adapters.settings import configured_settings, first_difference
from milora_lightning.adapters.surgery import inject
from milora_lightning.checkpoint.fingerprint import check_base, fingerprint, in_other_dtypes
from milora_lightning.checkpoint.io import KEY, CheckpointError
from milora_lightning.checkpoint.reading import (
    FORMAT,
    check_format,
    check_tensors,
    first_of,
    read_checkpoint,
    told_initialized,
)
from milora_lightning.config import LoRAConfig
from milora_lightning.parallel.dtensor import is_sharded
from milora_lightning.utils.names import key_in, rename_keys, unwrapped_name

DROPOUT = ("lora_dropout", "dropout_on")  # may change during training


class AdapterCheckpoint:
    """Leaves the base model out of a module's state dict, and checks the state dicts that the module loads.

    It is attached to a LightningModule and works with all of Lightning's ways to save and load. A state dict holds the
    adapters, other weights that train, and buffers, together with the configuration of the adapters and a fingerprint
    of the base model. Loading is all or nothing: a state dict with another base, rank, initialization or set of target
    layers is refused before any weight is copied.

    Args:
        module: The module, with adapters injected.
        config: The configuration of its adapters.
    """

    def __init__(self, module: nn.Module, config: LoRAConfig) -> None:
        self.config = config
        self.prefix = ""  # prefix of the module's keys in the state dict being loaded
        # The fingerprint is computed now, before a strategy casts or moves the weights, so that it is the same when
        # loading. On the meta device there are no weights yet; then it is computed when it is first needed.
        self.fingerprint = None if any(p.is_meta for p in module.parameters()) else fingerprint(module)

    def base(self, module: nn.Module) -> dict[str, str]:
        """Return the fingerprint of the module's base; if weights are sharded, all ranks must call this."""
        if self.fingerprint is None:
            self.fingerprint = fingerprint(module)
        return self.fingerprint

    @staticmethod
    def of(module: nn.Module | None) -> AdapterCheckpoint | None:
        """Return the instance attached to a module, or None."""
        attached = getattr(module, "_adapter_checkpoint", None)
        return attached if isinstance(attached, AdapterCheckpoint) else None

    @staticmethod
    def attach(module: nn.Module, config: LoRAConfig) -> AdapterCheckpoint:
        """Attach an instance to a module, unless it has one already, and return it.

        Args:
            module: A module with adapters.
            config: The configuration of its adapters.
        """
        attached = AdapterCheckpoint.of(module)
        if attached is not None:
            attached.config = config
        else:
            attached = AdapterCheckpoint(module, config)
            module._adapter_checkpoint = attached  # type: ignore[assignment]
            module.register_state_dict_post_hook(_remove_base_keys)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(_check_state_dict)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_post_hook(_ignore_missing_base)  # type: ignore[no-untyped-call]
        return attached

    def trim(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Remove the base from a state dict and add the description of the adapters.

        Args:
            module: The module.
            state: Its state dict; changed in place.
            prefix: Prefix of the module's keys.
        """
        in_base = _base_predicate(module)
        for key in [key for key in state if key.startswith(prefix)]:
            if in_base(key.removeprefix(prefix)):
                del state[key]
        if not is_sharded(module):  # for sharded weights, torch gathers and renames them itself
            rename_keys(state, prefix, unwrapped_name)
        state[prefix + KEY] = self.description(module)

    def description(self, module: nn.Module) -> dict[str, Any]:
        """Describe the adapters and their base in primitive types."""
        return {
            "format": FORMAT,
            "version": version("milora-lightning"),
            "config": {
                **asdict(self.config),
                "target_modules": _as_primitive(self.config.target_modules),
                "modules_to_save": tuple(saved_names(find_part(module, self.config.module), self.config)),
            },
            "adapters": list(lora_layers(module)),
            "uninitialized": [name for name, layer in lora_layers(module).items() if not layer.initialized],
            "base": self.base(module),
        }

    def check(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Refuse a state dict that does not fit the module; otherwise remove the description from it.

        Args:
            module: The module.
            state: The state dict to load; changed in place.
            prefix: Prefix of the module's keys.
        """
        self.prefix = prefix
        description = state.pop(prefix + KEY, None)
        names = {prefix + unwrapped_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
        if description is None and names <= state.keys():
            return  # a full state dict, as saved without MiLoRAInit
        self.check_description(module, description)
        kept = {prefix + unwrapped_name(key): value for key, value in module.state_dict().items() if key != KEY}
        entries = {key: value for key, value in state.items() if key.startswith(prefix)}
        check_tensors(entries, {key: getattr(value, "shape", None) for key, value in kept.items()}, names)
        for name, initialized in told_initialized(description).items():
            state[f"{prefix}{name}.{INITIALIZED}"] = initialized

    def check_description(self, module: nn.Module, description: dict[str, Any] | None) -> None:
        """Refuse adapters with another configuration or base, and checkpoints without adapters.

        Args:
            module: The module.
            description: The description of the adapters in a checkpoint, or None.

        Raises:
            CheckpointError: If the description does not fit the module, or is None.
        """
        if description is None:
            raise CheckpointError(
                "The checkpoint holds no adapters: it was saved without MiLoRAInit. Load it into the module before "
                "fitting with MiLoRAInit, instead of using ckpt_path."
            )
        check_format(description)
        self._check_config(description, lora_layers(module))
        saved = {unwrapped_name(name): value for name, value in description["base"].items()}
        here = self.base(module)
        alike = fingerprint(module, like=saved) if in_other_dtypes(saved, here) else here
        check_base(saved, alike, here)

    def _check_config(self, description: dict[str, Any], layers: dict[str, LoRALinear]) -> None:
        saved = LoRAConfig(**description["config"])
        adapters = {unwrapped_name(name) for name in description["adapters"]}
        # In the model's order, which is the same in every run.
        for layer in [name for name in layers if name in adapters]:
            rows = layers[layer].out_features
            here, there = (configured_settings(config, layer, rows) for config in (self.config, saved))
            if key := first_difference(here, there, ignore=DROPOUT):
                raise CheckpointError(
                    f"The checkpoint's adapters have {key}={there[key]}, this run's have {key}={here[key]}, as on "
                    f"{layer!r}. Use the configuration the checkpoint was trained with, or start without it."
                )
        missing, extra = sorted(layers.keys() - adapters), sorted(adapters - layers.keys())
        if missing or extra:
            same = _as_primitive(self.config.target_modules) == _as_primitive(saved.target_modules)
            remedy = f"Use those it was trained with: {saved.target_modules}."
            if same and not extra:  # selected by an older version with fewer kinds of layers, or excluded
                remedy = f"They are those it was trained with, so name these layers in exclude_modules: {missing}."
            raise CheckpointError(
                f"The checkpoint's adapters are on other layers: it has none for {first_of(missing)} and has some for "
                f"{first_of(extra)}, compared with this run's target_modules. {remedy}"
            )


# torch copies hooks with the module, so they are plain functions.
def _remove_base_keys(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    module._adapter_checkpoint.trim(module, state, prefix)  # type: ignore[operator, union-attr]


def _check_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # Checkpoints of compiled and plain modules fit each other: both are compared by the plain names.
    rename_keys(state, prefix, unwrapped_name)
    module._adapter_checkpoint.check(module, state, prefix)  # type: ignore[operator, union-attr]
    rename_keys(state, prefix, key_in(module))


def _ignore_missing_base(module: nn.Module, incompatible: Any) -> None:
    in_base, prefix = _base_predicate(module), str(module._adapter_checkpoint.prefix)  # type: ignore[union-attr]
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not (key.startswith(prefix) and in_base(key.removeprefix(prefix)))
    ]


def load_adapter(module: nn.Module, path: str | Path) -> LoRAConfig:
    """Load the adapters of a checkpoint into a module, injecting them if necessary.

    Args:
        module: The LightningModule that the checkpoint was saved from, with its model built; changed in place.
        path: A checkpoint written by a Trainer with ``MiLoRAInit``.

    Returns:
        The configuration of the adapters.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        CheckpointError: If it cannot be read, or does not fit the module.
    """
    state = read_checkpoint(path)["state_dict"]
    config = inject_as_in(module, state)
    module.load_state_dict(state)
    return config


def inject_as_in(module: nn.Module, state: dict[str, Any]) -> LoRAConfig:
    """Inject adapters as described in a state dict, without loading their values.

    Args:
        module: The module; changed in place.
        state: A state dict with a description of adapters.
    """
    check_format(state[KEY])
    # Exactly the layers that had adapters, rather than those that the saved target_modules would select now.
    config = replace(LoRAConfig(**state[KEY]["config"]), target_modules=state[KEY]["adapters"])
    inject(module, config, state[KEY]["adapters"])
    AdapterCheckpoint.attach(module, config)
    return config


def _base_predicate(module: nn.Module) -> Callable[[str], bool]:
    """Return a predicate for state dict keys that belong to the base and are omitted from checkpoints.

    These are the frozen parameters, and accompanying entries that are neither parameters nor buffers, such as the
    scales of a quantized weight. Adapters, other trained weights, buffers and extra states are kept.
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
        return of_a_weight or key.rpartition(".")[0] in holders  # "SCB", next to the weight

    return in_base


def _as_primitive(target_modules: Any) -> Any:
    return target_modules if isinstance(target_modules, str) else list(target_modules)
