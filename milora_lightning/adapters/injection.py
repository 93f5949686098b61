"""The first step of surgery: find the target layers and inject adapters, without arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from milora_lightning.adapters.coverage import remarks
from milora_lightning.adapters.frozen_statistics import freeze_statistics
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_linear
from milora_lightning.adapters.master_weights import keep_master_weights
from milora_lightning.adapters.parts import TargetNotFoundError, check_initialized, find_modules, find_part, some
from milora_lightning.adapters.quantization import holds_its_weight, keep_codes_in_place
from milora_lightning.adapters.targets import TRAINED_BEFORE, adaptable_layers, find_targets, select_layers
from milora_lightning.config import LoRAConfig, ends_in, first_difference
from milora_lightning.parallel.dtensor import is_sharded
from milora_lightning.utils.compat import bind_compiled
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn_once
from milora_lightning.utils.names import unwrapped_name


def inject(module: nn.Module, config: LoRAConfig, layers: Sequence[str] | None = None) -> dict[str, LoRALinear]:
    """Put a :class:`LoRALinear` around every target layer, and freeze everything else.

    No arithmetic is done, so it works on the meta device; the module's function does not change. Everything is
    checked before anything is changed. Layers that have an adapter of the same configuration already are left as
    they are, so injecting twice is injecting once. Follow it with :func:`milora_lightning.initialize`.

    Frozen means frozen: BatchNorm and whatever else keeps running statistics computes with those of the pretrained
    model in training, too, and does not change them, unless it is in ``modules_to_save``. What is in there is kept in
    float32 and computes in the dtype that it had.

    Args:
        module: Any module; changed in place.
        config: Which layers, which rank, which start.
        layers: The full names of exactly the layers that get adapters, those of a checkpoint for example, in place of
            what ``config`` says of them.

    Returns:
        All adapters of the module by name.

    Raises:
        ValueError: If a target name matches nothing or no linear layer, ``r`` exceeds a target's size, a target's
            weight is sharded already or tied to another layer's, or there are adapters of another configuration.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> sorted(inject(model, LoRAConfig(r=2, target_modules=["0"])))
    ['0']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A', '0.lora_B']
    """
    adapters = inject_quietly(module, config, layers)
    for remark in remarks(module, config) if layers is None else ():
        warn_once(module, remark)
    return adapters


def inject_quietly(module: nn.Module, config: LoRAConfig, layers: Sequence[str] | None = None) -> dict[str, LoRALinear]:
    """Do what :func:`inject` does, and say nothing of what is left out: perhaps not all of the module is there yet."""
    _check_no_peft(module)
    part = find_part(module, config.module)
    saved = find_modules(part, config.modules_to_save)
    kept = {child for each in saved for child in each.modules()}
    check_initialized(part, kept)
    selected = select_layers(module, config, kept).layers if layers is None else _exactly(module, layers)
    targets = {name: layer for name, layer in selected.items() if not isinstance(layer, LoRALinear)}
    present = lora_layers(module)
    _check_one_part(present, part, config)
    _check_same_config(present, config)
    _check_patterns([*targets, *present], config)
    for name, layer in targets.items():
        _check_not_sharded(name, layer)

    for each in saved:
        _check_trainable(each)

    _freeze(part, kept)
    freeze_statistics(part, kept)
    keep_codes_in_place(module)
    keep_master_weights(module, saved)
    _replace(module, targets, config)
    for adapter in lora_layers(part).values():
        adapter.lora_A.requires_grad_(True)
        adapter.lora_B.requires_grad_(True)
    return lora_layers(module)


def freeze_again(module: nn.Module, config: LoRAConfig) -> None:
    """Freeze the statistics of layers that have been replaced since surgery."""
    part = find_part(module, config.module)
    kept = find_modules(part, config.modules_to_save)
    freeze_statistics(part, {child for saved in kept for child in saved.modules()})


def _exactly(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of these full names."""
    there, names = adaptable_layers(module), [unwrapped_name(name) for name in names]
    missing = [name for name in names if name not in there]
    if missing:
        find_targets(module, missing)  # says what there is
        raise TargetNotFoundError(f"{type(module).__name__} has no linear layer {some(missing)}.")
    return {name: there[name] for name in names}


def _check_trainable(saved: nn.Module) -> None:
    for layer in saved.modules():
        weight = layer._parameters.get("weight")
        if not is_linear(layer) or weight is None or weight.is_complex():
            continue
        if not holds_its_weight(layer):
            raise InvalidInputError(
                f"modules_to_save means a {type(layer).__name__} whose weight is quantized and cannot train in full: "
                "leave it out, or load the model with this part unquantized."
            )


def _freeze(part: nn.Module, kept: Collection[nn.Module]) -> None:
    """Freeze all but adapters and what trains in full, and remember what was not frozen before."""
    for child in part.modules():
        own = [p for p in child._parameters.values() if p is not None]
        if child not in kept and not isinstance(child, LoRALinear) and any(p.requires_grad for p in own):
            setattr(child, TRAINED_BEFORE, True)
    for parameter in part.parameters():
        parameter.requires_grad_(False)
    for child in kept:
        for p in child._parameters.values():
            if p is not None:
                p.requires_grad_(p.is_floating_point() or p.is_complex())


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapters of a module by name; where parts of it are wrapped or compiled, by the plain module's name.

    >>> lora_layers(nn.Linear(2, 2))
    {}
    """
    return {unwrapped_name(name): layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def base_keys(module: nn.Module, frozen_only: bool = True) -> set[str]:
    """Return the names of all frozen parameters, or simply all, but those of adapters; as the module has them now."""
    factors = {
        f"{prefix}.{name}"
        for prefix, layer in module.named_modules()
        if isinstance(layer, LoRALinear)
        for name, _ in layer.named_parameters(recurse=False)
    }
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, p in parameters if not (frozen_only and p.requires_grad)} - factors


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Within this context, the module computes what it did before surgery, bit for bit.

    What ``modules_to_save`` has trained in full, or other parts that train, stay as they are now.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> with adapters_disabled(model):
    ...     pass
    """
    layers = list(lora_layers(module).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextmanager
def adapters_merged(module: nn.Module) -> Iterator[None]:
    """Within this context, each adapter's update is merged with its weight: see :meth:`LoRALinear.merge`.

    For generation. The base weights are not written, outputs stay the same to float32's rounding (bit for bit on a
    half-precision base), and everything else works as ever: training, checkpoints, :func:`adapters_disabled`.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> with adapters_merged(model):
    ...     pass
    """
    layers = [layer for layer in lora_layers(module).values() if not layer.merged]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def _check_no_peft(module: nn.Module) -> None:
    peft = sys.modules.get("peft.tuners.tuners_utils")  # imported by whoever has called get_peft_model
    for name, child in module.named_modules():
        if peft is not None and isinstance(child, peft.BaseTunerLayer):
            raise InvalidInputError(
                f"The model already carries PEFT layers, such as {name!r}: leave out get_peft_model, the adapters "
                "injected here take their place and can be exported for PEFT afterwards."
            )


def _check_one_part(present: dict[str, LoRALinear], part: nn.Module, config: LoRAConfig) -> None:
    inside = set(part.modules())
    outside = [name for name, layer in present.items() if layer not in inside]
    if outside:
        raise InvalidInputError(
            f"Layer {outside[0]!r} has an adapter already and is outside of module={config.module!r}, but a checkpoint "
            "holds the adapters of one part. Adapt both by one configuration, without module or with what holds both: "
            "target_modules and exclude_modules say which layers, rank_pattern which have other ranks."
        )


def _check_same_config(present: dict[str, LoRALinear], config: LoRAConfig) -> None:
    for name, layer in present.items():
        has, wanted = layer.settings, config.settings(name)
        if key := first_difference(has, wanted):
            raise InvalidInputError(
                f"Layer {name!r} has an adapter with {key}={has[key]} already, and {key}={wanted[key]} is asked for. "
                "Start from a fresh model, or use the configuration it was injected with."
            )


def _check_patterns(names: Collection[str], config: LoRAConfig) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if not any(ends_in(name, key) for name in names):
                raise TargetNotFoundError(f"The key {key!r} of {option} matches the name of no layer with an adapter.")


def _check_not_sharded(name: str, layer: nn.Module) -> None:
    if is_sharded(layer):
        raise InvalidInputError(
            f"The weight of layer {name!r} is sharded already, too late for adapters: in configure_model, call "
            "milora_lightning.inject(model, LoRAConfig(...)) before fully_shard, with the same settings as MiLoRAInit."
        )


def _replace(module: nn.Module, targets: dict[str, nn.Module], config: LoRAConfig) -> None:
    """Swap each target for its adapter wherever it is registered (a layer may be in several places)."""
    adapters = {}
    for name, layer in targets.items():
        adapters[layer] = LoRALinear(layer, config.rank(name), config.alpha(name), config.lora_dropout, config.init)
        adapters[layer].train(layer.training)
    for parent in list(module.modules()):
        if isinstance(parent, LoRALinear):
            continue
        for key, child in list(parent._modules.items()):  # named_children would skip a second registration
            if child in adapters:
                setattr(parent, key, adapters[child])
                bind_compiled(parent)
