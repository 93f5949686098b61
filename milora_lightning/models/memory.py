"""How much memory a run takes, from the model's configuration alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from milora_lightning.adapters.injection import inject, lora_layers
from milora_lightning.adapters.layer import linear_shape
from milora_lightning.config import LoRAConfig
from milora_lightning.models.loss import CPU_LOGITS, CPU_PROBABILITIES, DEVICE_LOGITS
from milora_lightning.models.pretrained import decoder_layers

OPTIMIZER_STATES = {"SGD": 0, "Adagrad": 4, "RMSprop": 4, "AdamW": 8, "Adam": 8, "AdamW8bit": 2, "PagedAdamW8bit": 2}
"""Bytes of an optimizer's state for each parameter that trains, by the optimizer's class."""

QUANTIZED = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0}
"""Bytes of a quantized weight: its code, and its share of a block's scale."""

BETWEEN = 0.5
"""What the C library leaves between tensors that come and go, as a share of them: 0.5 to 0.7 in measured runs."""

LOADED = 40_000_000
"""What the threads of the decompositions keep, and torch loads for its first step, in bytes."""

MASK = 1  # byte of each entry of a dropout mask


@dataclass(frozen=True)
class Part:
    """One thing that takes memory.

    Attributes:
        name: What it is.
        size: Bytes.
        reason: What the number rests on.
    """

    name: str
    size: int
    reason: str


@dataclass(frozen=True)
class Estimate:
    """What a run takes in memory.

    Attributes:
        parts: What is there at the height of a training step.
        surgery: What the decompositions take beside the weights, before there are activations.
        trainable: Number of parameters that train.
        total: Number of all parameters, without adapters' initial factors.
    """

    parts: list[Part]
    surgery: int
    trainable: int
    total: int

    @property
    def peak(self) -> int:
        """Bytes at the run's height."""
        held = sum(part.size for part in self.parts[:2])
        return max(sum(part.size for part in self.parts), held + self.surgery)


def planned_model(config: PretrainedConfig, dtype: torch.dtype, adapters: LoRAConfig | None) -> nn.Module:
    """Build a causal language model without weights, with its adapters.

    Args:
        config: The model's configuration.
        dtype: Dtype of its weights.
        adapters: The adapters; None for none, everything trains.

    Returns:
        The model on the meta device.

    Raises:
        ValueError: If the adapters do not fit the model.
    """
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
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
    gradient_checkpointing: bool = False,
    optimizer: str = "AdamW",
    attention: str = "sdpa",
    quantization: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Estimate:
    """Estimate the memory of training a decoder model with adapters.

    Args:
        model: The model with its adapters, on any device (:func:`planned_model`).
        config: Its configuration.
        batch_size: Rows of a batch.
        length: Tokens of each row, padding included.
        supervised: Share of the tokens that have labels.
        dropout: Probability of the adapters' dropout.
        gradient_checkpointing: Whether layers keep their input alone and compute the rest again.
        optimizer: Class name of the optimizer; one that is not known counts as AdamW.
        attention: ``sdpa``, ``flash_attention_2``, ``eager`` or ``causal_blocks``.
        quantization: ``nf4``, ``fp4`` or ``int8``, in which the layers' linear weights are; None for none.
        device: Kind of the device.

    Returns:
        The parts, in bytes. Activations are those that autograd keeps for backward in a dense decoder of
        transformers' making; of a mixture of experts each token counts with the experts it visits.
    """
    tokens = batch_size * length
    layers = decoder_layers(model)
    weights, trained, initial = _parameters(model)
    width = _dtype(model).itemsize
    if quantization is not None:
        linear = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
        weights -= int(linear * (width - QUANTIZED[quantization]))
    per_token = max((_kept_by_layer(layer, config, width, length, dropout, attention) for layer in layers), default=0)
    size = config.get_text_config()
    hidden = size.hidden_size * width
    each_layer, widest = tokens * per_token, tokens * width * 4 * (_intermediate(size) + size.hidden_size)
    kept = tokens * hidden * len(layers) if gradient_checkpointing else each_layer * len(layers)
    # Not together: when layers have gradients, beside a checkpoint with what they compute again, the logits are gone.
    in_backward = widest + (each_layer if gradient_checkpointing else 0)
    logits = _logits(size, width, tokens * supervised, device)
    states = OPTIMIZER_STATES.get(optimizer, OPTIMIZER_STATES["AdamW"])
    parts = [
        Part("frozen weights", weights, quantization or f"{width} bytes each"),
        Part("adapters", 4 * trained + initial, "in float32, with their initial factors, which stay as they are"),
        Part("their gradients", 4 * trained, "float32"),
        Part(f"{optimizer}'s state", states * trained, f"{states} bytes for each parameter that trains"),
        Part(
            "activations kept",
            kept + 4 * tokens * size.hidden_size,
            f"{batch_size} x {length} tokens, " + ("layer inputs" if gradient_checkpointing else "all layers"),
        ),
        Part(
            "computed at once",
            max(logits, in_backward),
            "a chunk of logits" if logits > in_backward else "the gradients of one layer",
        ),
    ]
    if device == "cpu":
        if gradient_checkpointing:
            between = len(layers) * widest
            why = "under each layer's input, where glibc's default leaves what it computed"
        else:
            between = int(BETWEEN * sum(part.size for part in parts[-2:]))
            why = f"{BETWEEN:.0%} of the last two, as measured with glibc"
        parts.append(Part("between tensors", between, why))
    return Estimate(parts, _surgery(model, device), trained, sum(_sizes(model)[:2]))


def _parameters(model: nn.Module) -> tuple[int, int, int]:
    """Return the bytes of frozen weights, the number of parameters that train, and the bytes of initial factors."""
    frozen, trained, initial = 0, 0, 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "initial_" in name.rpartition(".")[2]:
            initial += tensor.numel() * tensor.element_size()
        elif isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            trained += tensor.numel()
        else:
            frozen += tensor.numel() * tensor.element_size()
    return frozen, trained, initial


def _sizes(model: nn.Module) -> tuple[int, int]:
    frozen = sum(p.numel() for n, p in model.named_parameters() if not p.requires_grad and "initial_" not in n)
    return frozen, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _dtype(model: nn.Module) -> torch.dtype:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    return next(dtypes)


def _intermediate(size: Any) -> int:
    visited = int(getattr(size, "num_experts_per_tok", None) or 1)
    each = getattr(size, "moe_intermediate_size", None) if visited > 1 else None
    return visited * int(each or size.intermediate_size)


def _kept_by_layer(
    layer: nn.Module, config: PretrainedConfig, width: int, length: int, dropout: float, attention: str
) -> int:
    """Return the bytes that a decoder layer keeps of each token for backward."""
    size = config.get_text_config()
    heads = size.num_attention_heads
    groups = getattr(size, "num_key_value_heads", None) or heads
    head = getattr(size, "head_dim", None) or size.hidden_size // heads
    kept = 0
    for name, module in layer.named_modules():
        # Norms compute in float32, and keep their input so; those of heads see each of them.
        if "Norm" in type(module).__name__:
            times = {"q_norm": heads, "k_norm": groups}.get(name.rpartition(".")[2], 1)
            scales = getattr(module, "weight", None)
            kept += 4 * times * (size.hidden_size if scales is None else scales.numel())
    # Queries, keys and values, the latter repeated for every head where an implementation knows no groups; what became
    # of them; attention weights where they are formed.
    if attention == "eager":
        kept += 3 * heads * head * width + heads * length * (4 + (width if width < 4 else 0))
    elif attention == "causal_blocks":
        kept += (heads + 2 * groups) * head * width + heads * (length + 64) // 2 * width
    else:
        kept += 2 * (heads + groups) * head * width + 4 * heads
    kept += 3 * _intermediate(size) * width  # of a gated MLP: both products and the activation
    shared = ("o_proj",) if attention not in ("eager", "causal_blocks") else ()
    return int(kept) + sum(_kept_by_adapters(layer, width, dropout, shared))


def _kept_by_adapters(layer: nn.Module, width: int, dropout: float, kept: tuple[str, ...]) -> Iterable[int]:
    """Yield what adapters keep of each token: their input, once for those that share it, projection and mask."""
    inputs: set[tuple[str, int]] = set()
    for name, module in lora_layers(layer).items():
        features = linear_shape(module.base_layer)[1]
        parent, _, last = name.rpartition(".")
        if (parent, features) not in inputs and last not in kept:
            inputs.add((parent, features))
            yield width * features
        yield width * module.lora_A.shape[0]
        yield MASK * features if dropout else 0


def _logits(size: Any, width: int, supervised: float, device: str) -> int:
    chunk, full = (CPU_LOGITS, CPU_PROBABILITIES) if device == "cpu" else (DEVICE_LOGITS, DEVICE_LOGITS)
    everything = int(supervised) * size.vocab_size
    hidden = 2 * int(supervised) * size.hidden_size * width
    return int(min(chunk, everything) * width + 2 * min(full, everything) * 4 + hidden)


def _surgery(model: nn.Module, device: str) -> int:
    """Return what the largest decompositions take: the weight, its Gram matrix and eigenvectors, in float64."""
    needs = []
    for layer in lora_layers(model).values():
        rows, columns = linear_shape(layer.base_layer)
        needs.append(4 * rows * columns + 8 * 3 * min(rows, columns) ** 2)
    return max(needs, default=0) * (torch.get_num_threads() if device == "cpu" else 1)
