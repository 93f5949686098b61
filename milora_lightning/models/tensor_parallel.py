"""Tensor parallelism of language models, following transformers' plan for the model."""

from __future__ import annotations

import re

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from milora_lightning.adapters.candidates import base_of
from milora_lightning.adapters.experts import is_of_experts, stacked_weights
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_conv1d, is_plain_product, linear_shape, matrices_in
from milora_lightning.adapters.split import DIMS, Part, Style, split_linear, split_parameters
from milora_lightning.utils.compat.torch import quiet_gathering
from milora_lightning.utils.errors import InvalidInputError

HARMLESS = {"colwise_gather_output", "replicated_with_grad_allreduce"}
"""Styles in transformers' plan for heads and norms, which are replicated here."""


def parallelize(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split a language model's linear layers and their adapters over ranks, and replicate everything else.

    Args:
        model: The model with its adapters injected; its weights may be on the meta device. FSDP2 can follow.
        mesh: One-dimensional mesh of the ranks.

    Raises:
        ValueError: If the model has no plan, a plan for layers that are not plain products, or sizes that are not
            divisible by the number of ranks, or if anything besides the adapters trains.
    """
    adapters = lora_layers(model)
    stacks = [name for name, layer in adapters.items() if matrices_in(layer) is not None]
    if experts := stacks or [n for n, stack in stacked_weights(model).items() if is_of_experts(n, stack)]:
        raise InvalidInputError(
            f"{experts[0]!r} holds experts, which tensor parallelism does not split here: set tensor_parallel_size: 1 "
            "and share the weights out by FSDP2 alone."
        )
    if fused := next((name for name, layer in adapters.items() if layer.parts), None):
        raise InvalidInputError(
            f"{fused!r} has factors for each of its parts, which tensor parallelism does not split: leave fused_parts "
            "out, or set tensor_parallel_size: 1."
        )
    styles = planned(model)
    _check_heads(model, mesh.size())
    bases = {layer.base_layer for layer in adapters.values()}
    trained = {p for layer in adapters.values() for p in layer.parameters()}
    beside = next((name for name, p in model.named_parameters() if p.requires_grad and p not in trained), None)
    if beside is not None:
        raise InvalidInputError(
            f"{beside!r} trains besides the adapters, which tensor parallelism does not support: leave modules_to_save "
            "out, or set tensor_parallel_size: 1."
        )
    layers = {
        name: (layer, styles.get(layer, "replicate"))
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear) or (layer in styles and layer not in bases)
    }
    for name, (layer, style) in layers.items():
        _check_layer(name, layer, style, mesh.size())
    quiet_gathering()
    for layer, style in layers.values():
        part = Part(style, mesh)
        if isinstance(layer, LoRALinear):
            split_parameters(layer.base_layer, part)
            split_parameters(layer, part)
            layer.part = part
        else:
            split_linear(layer, part)


def planned(model: PreTrainedModel) -> dict[nn.Module, Style]:
    """Return the modules that transformers' plan for the model splits, with the style of each.

    Raises:
        ValueError: If there is no plan, or it splits something other than products.
    """
    plan: dict[str, str] = getattr(model.base_model.config, "base_model_tp_plan", None) or {}
    styles: dict[nn.Module, Style] = {}
    for pattern, style in plan.items():
        if style in HARMLESS:
            continue
        if style not in DIMS:
            raise InvalidInputError(
                f"The plan of {type(model).__name__} for tensor parallelism splits {pattern} by {style!r}, which "
                "adapters do not support: set tensor_parallel_size: 1."
            )
        name = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        found = [layer for key, layer in model.base_model.named_modules() if name.fullmatch(key)]
        styles.update(dict.fromkeys(found, style))
    if not styles:
        raise InvalidInputError(
            f"transformers has no plan for tensor parallelism of {type(model).__name__} (base_model_tp_plan): set "
            "tensor_parallel_size: 1."
        )
    return styles


def _check_heads(model: PreTrainedModel, ranks: int) -> None:
    config = model.base_model.config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % ranks:
            raise InvalidInputError(
                f"tensor_parallel_size is {ranks}, which does not divide the {heads} {name} of "
                f"{type(model).__name__}: choose a divisor."
            )


def _check_layer(name: str, layer: nn.Module, style: Style, ranks: int) -> None:
    base = base_of(layer)
    if is_conv1d(base) or not is_plain_product(base):
        raise InvalidInputError(
            f"Layer {name!r} ({type(base).__name__}) is more than the product with a frozen weight, and cannot be "
            "split among ranks: set tensor_parallel_size: 1."
        )
    if isinstance(layer, LoRALinear) and layer.lora_dropout and layer.dropout_on == "product":
        raise InvalidInputError(
            "dropout_on: product does not work with tensor parallelism: set tensor_parallel_size: 1, or leave it out."
        )
    dim, shape = DIMS[style].get("weight"), linear_shape(base)
    if dim is not None and shape[dim] % ranks:
        raise InvalidInputError(
            f"tensor_parallel_size is {ranks}, which does not divide the {shape[dim]} {('rows', 'columns')[dim]} of "
            f"layer {name!r}: choose a divisor."
        )
