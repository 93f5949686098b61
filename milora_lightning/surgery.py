"""The first step of surgery: find the target layers and inject adapters, without arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from milora_lightning.config import LoRAConfig, ends_in
from milora_lightning.fused import stacked_factors
from milora_lightning.lora import LoRALinear, linear_shape
from milora_lightning.names import unwrapped_name
from milora_lightning.sharding import is_sharded
from milora_lightning.targets import TargetNotFoundError, find_modules, find_targets


def inject(module: nn.Module, config: LoRAConfig) -> dict[str, LoRALinear]:
    """Put a :class:`LoRALinear` around every target layer, and freeze everything else.

    No arithmetic is done, so it works on the meta device; the module's function does not change. Everything is
    checked before anything is changed. Layers that have an adapter of the same configuration already are left as
    they are, so injecting twice is injecting once. Follow it with :func:`milora_lightning.initialize`.

    Args:
        module: Any module; changed in place.
        config: Which layers, which rank, which start.

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
    _check_no_peft(module)
    kept = find_modules(module, config.modules_to_save)
    targets = find_targets(module, config.target_modules)
    inside_kept = {child for saved in kept for child in saved.modules()}
    targets = {name: layer for name, layer in targets.items() if layer not in inside_kept}
    present = lora_layers(module)
    if not targets and not present:
        raise TargetNotFoundError("All of target_modules is inside modules_to_save: nothing is left to adapt.")
    _check_same_config(present, config)
    _check_patterns([*targets, *present], config)
    for name, layer in targets.items():
        if config.init != "lora":  # which needs no singular triplets; an adapter of PEFT's may have any rank
            _check_rank(name, layer, config.rank(name))
        _check_not_sharded(name, layer)
    _check_not_tied(module, targets)

    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for saved in kept:
        for parameter in saved.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    _replace(module, targets, config)
    adapters = lora_layers(module)
    for adapter in adapters.values():
        adapter.lora_A.requires_grad_(True)
        adapter.lora_B.requires_grad_(True)
    return adapters


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapters of a module by name; where parts of it are wrapped or compiled, by the plain module's name.

    >>> lora_layers(nn.Linear(2, 2))
    {}
    """
    return {unwrapped_name(name): layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Within this context, the module computes what it did before surgery, bit for bit.

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
def factors_kept(module: nn.Module) -> Iterator[None]:
    """Within this context, without gradients, each adapter prepares its factors once and not in every call.

    For generation, where the calls are many and small. Where the weight has the factors' precision, the update is added
    to a copy of it, which takes the memory of a second weight; a half-precision weight would round the update, and its
    factors are stacked and cast only. The factors must not change within the context. Those in shards, which FSDP makes
    whole for a call only, are stacked in each as ever.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> with factors_kept(model):
    ...     pass
    """
    # FSDP1's shards are flat.
    whole = [layer for layer in lora_layers(module).values() if layer.lora_A.ndim == 2 and not is_sharded(layer)]
    layers = [layer for layer in whole if layer.base_layer.weight.is_floating_point()]
    try:
        for layer in layers:
            dtype = layer.base_layer.weight.dtype
            layer.stacked = stacked_factors(*layer.factors, layer.scaling, dtype)
            layer.folded = layer.merged_weight().detach() if dtype == layer.lora_A.dtype else None
        yield
    finally:
        for layer in layers:
            layer.stacked = layer.folded = None


def _check_no_peft(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, BaseTunerLayer):
            raise ValueError(
                f"The model already carries PEFT layers, such as {name!r}: leave out get_peft_model, the adapters "
                "injected here take their place and can be exported for PEFT afterwards."
            )


def _check_same_config(present: dict[str, LoRALinear], config: LoRAConfig) -> None:
    for name, layer in present.items():
        for key, has, wants in (
            ("r", layer.r, config.rank(name)),
            ("lora_alpha / r", layer.scaling, config.scale(name)),
            ("lora_dropout", layer.lora_dropout, config.lora_dropout),
            ("init", layer.init, config.init),
        ):
            if has != wants:
                raise ValueError(
                    f"Layer {name!r} has an adapter with {key}={has} already, and {key}={wants} is asked for. "
                    "Start from a fresh model, or use the configuration it was injected with."
                )


def _check_patterns(names: Collection[str], config: LoRAConfig) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if not any(ends_in(name, key) for name in names):
                raise TargetNotFoundError(f"The key {key!r} of {option} matches the name of no layer with an adapter.")


def _check_rank(name: str, layer: nn.Module, r: int) -> None:
    out_features, in_features = linear_shape(layer)
    if r > min(out_features, in_features):
        raise ValueError(
            f"r={r} is larger than layer {name!r} allows, whose weight is {out_features}×{in_features}. "
            f"Choose r of at most {min(out_features, in_features)}, or leave the layer out of target_modules."
        )


def _check_not_sharded(name: str, layer: nn.Module) -> None:
    if is_sharded(layer):
        raise ValueError(
            f"The weight of layer {name!r} is sharded already, too late for adapters: in configure_model, call "
            "milora_lightning.inject(model, LoRAConfig(...)) before fully_shard, with the same settings as MiLoRAInit."
        )


def _check_not_tied(module: nn.Module, targets: dict[str, nn.Module]) -> None:
    users = defaultdict(set)
    for name, child in module.named_modules():
        for key, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            users[_storage(parameter)].add(unwrapped_name(f"{name}.{key}".lstrip(".")))
    for name, layer in targets.items():
        others = users[_storage(layer.get_parameter("weight"))] - {f"{name}.weight"}
        if others:
            raise ValueError(
                f"The weight of target {name!r} is tied to {', '.join(sorted(others))}: an adapter would change one "
                "and not the other. Leave it out of target_modules, or untie the weights."
            )


def _storage(parameter: Tensor) -> tuple[object, ...]:
    """What two parameters have in common if and only if they are one memory (or one object, without memory)."""
    if parameter.is_meta or parameter.numel() == 0 or parameter.data_ptr() == 0:
        return ("object", id(parameter))
    return (parameter.device, parameter.data_ptr())


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
                if isinstance(parent, OptimizedModule):  # a compiled layer, which has bound the layer's own call
                    parent.__setstate__(parent.__getstate__())
