"""An estimate of the memory that a training run needs, computed from the model's configuration alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import linear_shape
from milora_lightning.adapters.surgery import inject
from milora_lightning.config import LoRAConfig
from milora_lightning.models.loss import CPU_LOGITS, CPU_PROBABILITIES, DEVICE_LOGITS
from milora_lightning.models.pretrained import auto_class, decoder_layers
from milora_lightning.models.recompute import recomputed
from milora_lightning.utils.compat import TELLS_HOW_IT_KEEPS

OPTIMIZER_STATES = {
    "SGD": 0,
    "Adagrad": 4,
    "RMSprop": 4,
    "AdamW": 8,
    "Adam": 8,
    "AdamW8bit": 2,
    "PagedAdamW8bit": 2,
    "AdamWFp8": 2,
    "AdamW4bit": 1,
}
"""Bytes of optimizer state per trainable parameter, by the optimizer's class."""

QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0}
"""Bytes per quantized weight: its code, and its share of the block's scale."""

FRAGMENTATION = 0.5
"""Memory that the C library loses between short-lived tensors, as a share of them; 0.5 to 0.7 in measured runs."""

LOADED = 40_000_000
"""Bytes that the decompositions' threads keep and that torch loads for its first step."""


@dataclass(frozen=True)
class Part:
    """One thing that takes memory.

    Attributes:
        name: What it is.
        size: Its size in bytes.
        reason: What the number is based on.
    """

    name: str
    size: int
    reason: str


@dataclass(frozen=True)
class Estimate:
    """The memory that a run needs.

    Attributes:
        parts: Everything in memory at the peak of a training step; the first two are weights and adapters.
        surgery: Bytes that the decompositions need in addition to the weights, before there are activations.
        trainable: Number of trainable parameters.
        total: Number of all parameters, without the adapters' initial factors.
    """

    parts: list[Part]
    surgery: int
    trainable: int
    total: int

    @property
    def peak(self) -> int:
        """The most bytes that the run needs at any time."""
        model = sum(part.size for part in self.parts[:2])
        return max(sum(part.size for part in self.parts), model + self.surgery)


def planned_model(config: PretrainedConfig, dtype: torch.dtype, adapters: LoRAConfig | None) -> nn.Module:
    """Build a causal language model with its adapters on the meta device, where weights take no memory.

    Args:
        config: The model's configuration.
        dtype: Dtype of its weights.
        adapters: The adapters; None to train all weights without adapters.

    Returns:
        The model on the meta device.

    Raises:
        ValueError: If the adapters do not fit the model.
    """
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config, dtype=dtype)
        if adapters is not None:
            inject(model, adapters)
    return model


def estimate(
    model: nn.Module,
    config: PretrainedConfig,
    batch_size: int,
    length: int,
    *,
    supervised: float = 1.0,
    dropout: float = 0.0,
    gradient_checkpointing: bool | float = False,
    optimizer: str = "AdamW",
    attention: str = "sdpa",
    quantization: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Estimate:
    """Estimate the memory of training a decoder model with adapters.

    Args:
        model: The model with its adapters, on any device (:func:`planned_model`).
        config: Its configuration.
        batch_size: Rows in a batch.
        length: Tokens in each row, padding included.
        supervised: Share of the tokens that have labels.
        dropout: Probability of the adapters' dropout. Its masks are kept on CPUs only.
        gradient_checkpointing: Whether layers keep only their input and recompute the rest in backward; or the share
            of them that does.
        optimizer: Class name of the optimizer; an unknown one counts as AdamW.
        attention: ``sdpa``, ``flash_attention_2``, ``eager`` or ``causal_blocks``.
        quantization: ``nf4``, ``fp4`` or ``int8`` if the layers' linear weights are quantized; None if not.
        device: Device type.

    Returns:
        The estimate. Activations are those that autograd keeps for backward in a dense decoder as transformers
        implements it; in a mixture of experts, each token counts for the experts that it is routed to.
    """
    tokens = batch_size * length
    layers = decoder_layers(model)
    weights, trained, initial = _parameters(model)
    width = _dtype(model).itemsize
    if quantization is not None:
        linear = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
        weights -= int(linear * (width - QUANTIZED_BYTES[quantization]))
    masks = dropout > 0 and device == "cpu"
    per_token = max((_saved_by_layer(layer, config, width, length, masks, attention) for layer in layers), default=0)
    stacks = max((_stacked_factors(layer, width) for layer in layers), default=0)
    size = config.get_text_config()
    hidden = size.hidden_size * width
    each_layer, widest = tokens * per_token + stacks, tokens * width * 4 * (_intermediate(size) + size.hidden_size)
    again = recomputed(len(layers), gradient_checkpointing)
    kept = tokens * hidden * again + each_layer * (len(layers) - again)
    # The logits are freed before the layers' backward, so only the larger of the two counts. With gradient
    # checkpointing, backward also holds the recomputed activations of one layer; by then, others' are free.
    in_backward = widest + (each_layer if again == len(layers) else 0)
    logits = _logits(size, width, tokens * supervised, device)
    states = OPTIMIZER_STATES.get(optimizer, OPTIMIZER_STATES["AdamW"])
    parts = [
        Part("frozen weights", weights, quantization or f"{width} bytes each"),
        Part("adapters", 4 * trained + initial, "in float32, with their initial factors, which do not change"),
        Part("their gradients", 4 * trained, "float32"),
        Part(f"{optimizer}'s state", states * trained, f"{states} bytes per trainable parameter"),
        Part(
            "activations kept",
            kept + 4 * tokens * size.hidden_size,
            f"{batch_size} x {length} tokens, " + _which_layers(again, len(layers)),
        ),
        Part(
            "computed at once",
            max(logits, in_backward),
            "a chunk of logits" if logits > in_backward else "the gradients of one layer",
        ),
    ]
    if device == "cpu":
        share = again / len(layers)
        lost = int(again * widest + (1 - share) * FRAGMENTATION * sum(part.size for part in parts[-2:]))
        reason = f"{FRAGMENTATION:.0%} of the last two, as measured with glibc"
        if again:
            reason = "under each layer's input, where glibc's default leaves what it computed"
        parts.append(Part("between tensors", lost, reason))
    total = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad or "initial_" not in n)
    return Estimate(parts, _surgery(model, device), trained, total)


def _which_layers(again: int, layers: int) -> str:
    if again in (0, layers):
        return "layer inputs" if again else "all layers"
    return f"inputs of {again} layers, {layers - again} whole"


def _parameters(model: nn.Module) -> tuple[int, int, int]:
    """Return the bytes of frozen weights, the number of trainable parameters, and the bytes of initial factors."""
    frozen, trained, initial = 0, 0, 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "initial_" in name.rpartition(".")[2]:
            initial += tensor.numel() * tensor.element_size()
        elif isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            trained += tensor.numel()
        else:
            frozen += tensor.numel() * tensor.element_size()
    return frozen, trained, initial


def _dtype(model: nn.Module) -> torch.dtype:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    return next(dtypes)


def _intermediate(size: Any) -> int:
    """Return the intermediate features that a token passes through, in all experts that it is routed to."""
    experts = int(getattr(size, "num_experts_per_tok", None) or 1)
    per_expert = getattr(size, "moe_intermediate_size", None) if experts > 1 else None
    return experts * int(per_expert or size.intermediate_size)


def _saved_by_layer(
    layer: nn.Module, config: PretrainedConfig, width: int, length: int, masks: bool, attention: str
) -> int:
    """Return the bytes per token that a decoder layer saves for backward."""
    size = config.get_text_config()
    heads = size.num_attention_heads
    groups = getattr(size, "num_key_value_heads", None) or heads
    head_dim = getattr(size, "head_dim", None) or size.hidden_size // heads
    saved = 0
    for name, module in layer.named_modules():
        # Norms compute in float32 and save their input so; norms of queries and keys have an input for each head.
        if "Norm" in type(module).__name__:
            times = {"q_norm": heads, "k_norm": groups}.get(name.rpartition(".")[2], 1)
            scales = getattr(module, "weight", None)
            saved += 4 * times * (size.hidden_size if scales is None else scales.numel())
    # Queries, keys and values, the latter two repeated for every head by implementations that do not support groups;
    # the output, or what it takes to recompute it; attention weights where they are materialized.
    if attention == "eager":
        saved += 3 * heads * head_dim * width + heads * length * (4 + (width if width < 4 else 0))
    elif attention == "causal_blocks":
        saved += (heads + 2 * groups) * head_dim * width + heads * (length + 64) // 2 * width
    else:
        saved += 2 * (heads + groups) * head_dim * width + 4 * heads
    saved += 3 * _intermediate(size) * width  # gated MLP: both products and the activation
    # The output of attention, and the gated MLP's product, which is formed again from its factors.
    already_saved = ("down_proj",) if TELLS_HOW_IT_KEEPS else ()
    if attention not in ("eager", "causal_blocks"):
        already_saved = ("o_proj", *already_saved)
    return int(saved) + sum(_saved_by_adapters(layer, width, masks, already_saved))


def _saved_by_adapters(layer: nn.Module, width: int, masks: bool, already_saved: tuple[str, ...]) -> Iterable[int]:
    """Yield the bytes per token that adapters save: the input (once if several share it), projection and mask."""
    inputs: set[tuple[str, int]] = set()
    for name, module in lora_layers(layer).items():
        features = linear_shape(module.base_layer)[1]
        parent, _, last = name.rpartition(".")
        if (parent, features) not in inputs and last not in already_saved:
            inputs.add((parent, features))
            yield width * features
        yield width * _stacked_rank(module)
        if masks:
            yield features


def _stacked_factors(layer: nn.Module, width: int) -> int:
    """Return the bytes of the stacked factors that the adapters of a layer save in its dtype."""
    adapters = lora_layers(layer).values()
    cast = [m for m in adapters if m.initial_A is not None or width != m.lora_A.itemsize]
    return sum(width * _stacked_rank(m) * sum(linear_shape(m.base_layer)) for m in cast)


def _stacked_rank(adapter: LoRALinear) -> int:
    return adapter.r if adapter.initial_A is None else 2 * adapter.r


def _logits(size: Any, width: int, supervised: float, device: str) -> int:
    """Return the bytes of the chunks of logits and of the hidden states with their gradient."""
    chunk, float_chunk = (CPU_LOGITS, CPU_PROBABILITIES) if device == "cpu" else (DEVICE_LOGITS, DEVICE_LOGITS)
    logits = int(supervised) * size.vocab_size
    hidden = 2 * int(supervised) * size.hidden_size * width
    return int(min(chunk, logits) * width + 2 * min(float_chunk, logits) * 4 + hidden)


def _surgery(model: nn.Module, device: str) -> int:
    """Return the bytes of the largest decompositions, one per thread: weight, Gram matrix and eigenvectors."""
    needs = []
    for layer in lora_layers(model).values():
        rows, columns = linear_shape(layer.base_layer)
        needs.append(4 * rows * columns + 8 * 3 * min(rows, columns) ** 2)
    return max(needs, default=0) * (torch.get_num_threads() if device == "cpu" else 1)
