"""Reports on which part of a model has adapters: remarks after surgery, and lines of the summary."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from milora_lightning.adapters.candidates import output_heads
from milora_lightning.adapters.experts import LoRAExperts, is_of_experts, routers, stacked_weights
from milora_lightning.adapters.freezing import TRAINED_BEFORE, frozen_by_user
from milora_lightning.adapters.held_weight import HeldWeight
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_linear, linear_shape, matrices_in
from milora_lightning.adapters.new_layers import looks_new, named_as_head, saved_modules, saved_names
from milora_lightning.adapters.parts import (
    ends_with,
    find_part,
    first_few,
    layers_by_name,
    modules_by_name,
    modules_inside,
)
from milora_lightning.adapters.quantization import is_quantized_linear
from milora_lightning.adapters.target_errors import FROZEN, TOO_SMALL
from milora_lightning.adapters.targets import Selection, select_layers
from milora_lightning.adapters.weight_reads import read_weights
from milora_lightning.config import ALL_LINEAR, AUTO, LoRAConfig
from milora_lightning.utils.compat.torch import ConvNd

LARGE_SHARE = 0.1
"""Minimum share of weights without adapters that causes a remark."""

EXPERTS = "experts in 3-D parameters"
EXPERTS_2D = "experts in 2-D parameters"
TRANSPOSED = "transposed convolutions"
QUANTIZED = "linear layers whose weights are codes"
UNSUPPORTED = (
    EXPERTS,
    EXPERTS_2D,
    "other 3-D parameters",
    "convolutions",
    TRANSPOSED,
    "nn.MultiheadAttention's in_proj_weight",
    "recurrent layers",
    QUANTIZED,
)


def remarks(module: nn.Module, config: LoRAConfig) -> Iterator[str]:
    """Yield remarks after surgery on results that users may not expect, each in a sentence or two.

    Args:
        module: The module with adapters.
        config: The configuration they were injected with.
    """
    part = find_part(module, config.module)
    kept = _kept(part, config)
    selection = select_layers(module, config, kept)
    if config.modules_to_save == AUTO:
        names = saved_names(part, config)
        yield f'modules_to_save="{AUTO}": ' + (
            f"{first_few(names, 10)}: new or a classifier's, and trained in full. To train others, name them instead."
            if names
            else "nothing looks new or like a classifier, so only adapters train."
        )
    yield from _left_out(module, selection, config)
    yield from _read_weights(part, config)
    yield from _fresh_heads(module, part, selection, kept)
    yield from _unreached(part, config, kept)


def coverage(module: nn.Module, config: LoRAConfig) -> str:
    """Describe the share of weights that have adapters, and the kinds of the others, largest first.

    Embeddings, the output embeddings of language models, and parts frozen for another purpose do not count.

    Args:
        module: The module with adapters.
        config: The configuration they were injected with.
    """
    sizes = _sizes(part := find_part(module, config.module), _kept(part, config))
    total = sum(sizes.values())
    without = sorted((kind for kind in sizes if kind != "adapted"), key=lambda kind: -sizes[kind])
    rest = ", ".join(f"{kind} {sizes[kind] / total:.1%}" for kind in without if sizes[kind] / total >= 0.001)
    return f"{sizes['adapted'] / total:.1%} of the weights" + (f"; without: {rest}" if rest else "")


def adapters_by_part(module: nn.Module, config: LoRAConfig) -> str:
    """Describe how many matrices have adapters in each part of a module, and why if there are none.

    Args:
        module: The module with adapters.
        config: The configuration they were injected with.
    """
    root = find_part(module, config.module)
    selection = select_layers(module, config, kept := _kept(root, config))
    layers = layers_by_name(module)
    reasons = {layers[name]: reason for name, reason in selection.left_out.items()}
    counts = {}
    for name, part in module.named_children():
        if not any(True for _ in part.parameters()):
            continue
        inside = list(part.modules())
        number = sum(matrices_in(child) or 1 for child in inside if isinstance(child, LoRALinear))
        counts[name] = f"{number} {'matrix' if number == 1 else 'matrices'}" if number else "none"
        if not number:
            why = {reasons[child] for child in inside if child in reasons}
            if (
                config.module is not None
                and not any(child is root for child in inside)
                and part not in set(root.modules())
            ):
                counts[name] += " (left as it is)"
            elif all(child in kept for child in inside if child._parameters):
                counts[name] += " (trains in full)"
            elif FROZEN in why or all(
                frozen_by_user(m) for m in inside if any(p is not None for p in m._parameters.values())
            ):
                counts[name] += " (frozen by you)"
            elif why:
                counts[name] += f" ({', '.join(sorted(why)).removeprefix('is ')})"
    return "; ".join(f"{name}: {count}" for name, count in counts.items())


def _kept(part: nn.Module, config: LoRAConfig) -> set[nn.Module]:
    return modules_inside(saved_modules(part, config))


def _left_out(module: nn.Module, selection: Selection, config: LoRAConfig) -> Iterator[str]:
    reasons = defaultdict(list)
    for name, reason in selection.left_out.items():
        reasons[reason].append(name)
    reasons.pop(FROZEN, None)  # intended by the user; the summary mentions it
    small = reasons.pop(TOO_SMALL, [])
    if small:
        layers = layers_by_name(module)
        shapes = {name: linear_shape(layers[name]) for name in small}
        listed = ", ".join(f"{name!r} ({m}×{n})" for name, (m, n) in list(shapes.items())[:3])
        more = f" and {len(small) - 3} more" if len(small) > 3 else ""
        heads = [name for name in small if not any(part.isdigit() for part in name.split("."))] or small
        yield (
            f"Too small for adapters of r={config.r}, and frozen: {listed}{more}. What is new, as a head, has to train "
            f"in full: modules_to_save={[heads[-1].rsplit('.', 1)[-1]]!r}."
        )
    for reason, names in reasons.items():
        one = len(names) == 1
        yield f"Layer{'' if one else 's'} {first_few(names)} {reason} and get{'s' if one else ''} no adapter."


def _read_weights(part: nn.Module, config: LoRAConfig) -> Iterator[str]:
    """Describe the limits of adapters whose weight the model reads without calling their layer."""
    read = read_weights(part)
    rounded = [name for name, layer in read.items() if layer.base_layer.weight.element_size() < 4]
    lacks = ["lora_dropout has no effect there"] if read and config.lora_dropout else []
    if rounded:
        lacks.append("each update is rounded together with the weight, so that small ones are lost: exclude_modules")
    if lacks:
        names = first_few(rounded or list(read))
        yield f"The model reads the weight of {names} in place of calling the layer: {', and '.join(lacks)}."


def experts_adapted(module: nn.Module) -> str | None:
    """Describe how many experts' matrices have adapters, and their trainable parameters; None if there are none."""
    stacks = [m for m in module.modules() if isinstance(m, LoRAExperts)]
    if not stacks:
        return None
    number, trained = sum(m.matrices for m in stacks), sum(m.lora_A.numel() + m.lora_B.numel() for m in stacks)
    shapes = Counter(f"{m.out_features}×{m.in_features}" for m in stacks)
    listed = " and ".join(shape for shape, _ in shapes.most_common(2))
    ranks = sorted({m.r for m in stacks})
    r = f"r={ranks[0]}" if len(ranks) == 1 else f"r from {ranks[0]} to {ranks[-1]}"
    return (
        f"Experts with adapters: {number:,} matrices ({listed}) in {len(stacks)} stacks; with {r}, {trained:,} "
        "trainable parameters."
    )


def _fresh_heads(module: nn.Module, part: nn.Module, selection: Selection, kept: set[nn.Module]) -> Iterator[str]:
    """Yield remarks on layers that look newly created for the task but neither train nor have an adapter."""
    lm_heads = output_heads(part)
    adapted = [m.base_layer for m in part.modules() if isinstance(m, LoRALinear)]
    pretrained = not all(looks_new(layer) for layer in adapted[:: max(1, len(adapted) // 8)])
    inside = {
        child for m in part.modules() if isinstance(m, (LoRALinear, nn.MultiheadAttention)) for child in m.modules()
    }
    heads = []
    stacks = [*stacked_weights(module), *(n for n, m in lora_layers(module).items() if isinstance(m, LoRAExperts))]
    left = routers(by_name := modules_by_name(module), stacks)
    for name, child in by_name.items():
        if name in left:
            continue
        if not (is_linear(child) or isinstance(child, ConvNd)) or child in inside or child in kept or child in lm_heads:
            continue
        if (
            not getattr(child, TRAINED_BEFORE, False)
            or selection.left_out.get(name) == TOO_SMALL
            or ends_with(name, "lm_head")
        ):
            continue
        if named_as_head(name) or (pretrained and isinstance(child, nn.Linear) and looks_new(child)):
            heads.append(name)
    if heads:
        yield (
            f"{first_few(heads)}: looks newly made for this task, and neither trains nor has an adapter. If it is, "
            f"train it in full: modules_to_save={[heads[-1]]!r}."
        )


def _unreached(part: nn.Module, config: LoRAConfig, kept: set[nn.Module]) -> Iterator[str]:
    sizes = _sizes(part, kept)
    total = sum(sizes.values())
    kinds = UNSUPPORTED if config.target_modules == ALL_LINEAR else (EXPERTS,)
    without = {kind: sizes[kind] / total for kind in kinds if sizes.get(kind)}
    if sum(without.values()) >= LARGE_SHARE:
        listed = ", ".join(f"{kind} {share:.0%}" for kind, share in without.items())
        yield (
            f"Adapters reach {sizes['adapted'] / total:.0%} of the weights (without embeddings and output embeddings): "
            f"{listed} stay frozen without adapters."
            + (" Convolutions get adapters where target_modules names them." if "convolutions" in without else "")
            + (f" Experts get some where target_parameters names them{_examples(part)}." if EXPERTS in without else "")
        )


def _examples(part: nn.Module) -> str:
    names = [name for name, stack in stacked_weights(part).items() if is_of_experts(name, stack)]
    endings = sorted({".".join(name.split(".")[-2:]) for name in names})
    return f": {endings}" if endings else ""


def _sizes(part: nn.Module, kept: set[nn.Module]) -> dict[str, int]:
    """Count the weights of each kind."""
    sizes: dict[str, int] = defaultdict(int, adapted=0)
    heads = output_heads(part)
    adapters = [m for m in part.modules() if isinstance(m, LoRALinear)]
    bases: set[Any] = {m.base_layer for m in adapters}
    held = {(base.holder, base.parameter) for base in bases if isinstance(base, HeldWeight)}
    for name, child in modules_by_name(part).items():
        if isinstance(child, LoRALinear):
            sizes["adapted"] += math.prod(linear_shape(child.base_layer)) * (matrices_in(child) or 1)
        elif is_quantized_linear(child):
            sizes[QUANTIZED] += cast(int, child.in_features) * cast(int, child.out_features)
        elif child not in bases and child not in heads and not ends_with(name, "lm_head"):
            for key, parameter in child._parameters.items():
                skip = parameter is None or (child, key) in held
                kind = None if skip else _kind(child, f"{name}.{key}", cast(Tensor, parameter), kept)
                if kind and parameter is not None:
                    linear = is_linear(child) and key == "weight"
                    sizes[kind] += math.prod(linear_shape(child)) if linear else parameter.numel()
    return sizes


def _kind(owner: nn.Module, name: str, parameter: Tensor, kept: set[nn.Module]) -> str | None:
    if owner in kept:
        return "trained in full"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) or frozen_by_user(owner) or parameter.ndim < 2:
        return None
    if isinstance(owner, ConvNd):
        return TRANSPOSED if owner.transposed else "convolutions"
    if isinstance(owner, nn.MultiheadAttention):
        return "nn.MultiheadAttention's in_proj_weight"
    if isinstance(owner, nn.RNNBase):
        return "recurrent layers"
    if parameter.ndim > 2 and parameter.shape[0] > 1:  # not position embeddings of shape (1, n, d)
        return EXPERTS if "expert" in name or "Experts" in type(owner).__name__ else "other 3-D parameters"
    if "experts" in name.split(".") and not is_linear(owner) and not name.endswith("bias"):
        return EXPERTS_2D  # DBRX stacks them along the rows
    return "other linear layers" if is_linear(owner) else "other weights"
