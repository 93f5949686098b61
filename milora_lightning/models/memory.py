"""An estimate of the memory that a training run needs, computed from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig

from milora_lightning.adapters.decomposing import SMALL
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.linear_layers import groups_of, linear_shape
from milora_lightning.adapters.surgery import inject
from milora_lightning.config import LoRAConfig
from milora_lightning.linalg.partial import suits_krylov, takes_all
from milora_lightning.models.activations import active_intermediate, saved_by_layer, stacked_factors
from milora_lightning.models.loss import CPU_LOGITS, CPU_PROBABILITIES, DEVICE_LOGITS
from milora_lightning.models.pretrained import auto_class, decoder_layers
from milora_lightning.models.recompute import recomputed
from milora_lightning.parallel.work import cost
from milora_lightning.utils.counting import counted

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
"""Bytes per quantized weight, including its share of the block's scale."""

FRAGMENTATION = 0.5
"""Memory lost to fragmentation between short-lived tensors, relative to their size; 0.5 to 0.7 in measured runs."""

LOADED = 40_000_000
"""Bytes kept by the decompositions' threads, plus libraries that torch loads for its first step."""


@dataclass(frozen=True)
class Part:
    """One contribution to the memory.

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
        parts: Contributions at the peak of a training step; the first two are weights and adapters.
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
        """The peak memory of the run in bytes."""
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
    shards: int = 1,
    mapped: bool = False,
) -> Estimate:
    """Estimate the memory of training a decoder model with adapters.

    Args:
        model: The model with its adapters, on any device (:func:`planned_model`).
        config: Its configuration.
        batch_size: Rows in a batch.
        length: Tokens in each row, padding included.
        supervised: Share of the tokens that have labels.
        dropout: Probability of the adapters' dropout. Its masks are stored on CPUs only.
        gradient_checkpointing: Whether layers keep only their input and recompute the rest in backward, or the share of
            layers that do.
        optimizer: Class name of the optimizer; an unknown one counts as AdamW.
        attention: ``sdpa``, ``flash_attention_2``, ``eager`` or ``causal_blocks``.
        quantization: ``nf4``, ``fp4`` or ``int8`` if the layers' linear weights are quantized; None if not.
        device: Device type.
        shards: Number of devices that share weights, adapters, gradients and optimizer state (FSDP2).
        mapped: Whether, with gradient checkpointing on a CPU, freed memory returns to the system, see
            :func:`milora_lightning.utils.allocator.map_large_tensors`.

    Returns:
        The estimate for one device. Activations are those that autograd keeps for backward in a dense decoder as
        transformers implements it; in a mixture of experts, each token counts for the experts that it is routed to.
    """
    tokens = batch_size * length
    layers = decoder_layers(model)
    weights, trained, initial = _parameters(model)
    width = _dtype(model).itemsize
    if quantization is not None:
        linear = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
        weights -= int(linear * (width - QUANTIZED_BYTES[quantization]))
    masks = dropout > 0 and device == "cpu"
    per_token = max((saved_by_layer(layer, config, width, length, masks, attention) for layer in layers), default=0)
    stacks = max((stacked_factors(layer, width) for layer in layers), default=0)
    size = config.get_text_config()
    hidden = size.hidden_size * width
    each_layer, widest = (
        tokens * per_token + stacks,
        tokens * width * 4 * (active_intermediate(size) + size.hidden_size),
    )
    again = recomputed(len(layers), gradient_checkpointing)
    kept = tokens * hidden * again + each_layer * (len(layers) - again)
    # The logits are freed before the layers' backward, so only the larger of the two counts. With gradient
    # checkpointing, backward also holds the recomputed activations of one layer; by then, those of other layers are
    # free.
    in_backward = widest + (each_layer if again == len(layers) else 0)
    logits = _logits(size, width, tokens * supervised, device)
    parts = [
        *_held(
            weights, trained, initial, optimizer, quantization or f"{width} bytes each", shards, _what_trains(model)
        ),
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
    if device == "cpu" and not (again and mapped):
        share = again / len(layers)
        lost = int(again * widest + (1 - share) * FRAGMENTATION * sum(part.size for part in parts[-2:]))
        reason = f"{FRAGMENTATION:.0%} of the last two, as measured with glibc"
        if again:
            reason = "at most: under each layer's input, where an allocator may leave what it computed"
        parts.append(Part("between tensors", lost, reason))
    if shards > 1:
        parts.append(Part("gathered", _gathered(model, layers), "one layer, the next one, and what is in no layer"))
    total = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad or "initial_" not in n)
    return Estimate(parts, _surgery(model, device), trained, total)


def _what_trains(model: nn.Module) -> tuple[str, str]:
    """Return what trains, and what it consists of."""
    if lora_layers(model):
        return "adapters", "in float32, with their initial factors, which do not change"
    return "weights that train", "in float32"


def _held(
    weights: int, trained: int, initial: int, optimizer: str, how: str, shards: int, what: tuple[str, str]
) -> list[Part]:
    """Return the contributions in memory from the first step on: weights, adapters, gradients, optimizer state."""
    states = OPTIMIZER_STATES.get(optimizer, OPTIMIZER_STATES["AdamW"])
    share = f", a share of 1/{shards}" if shards > 1 else ""
    whole = [
        Part("frozen weights", weights, how + share),
        Part(what[0], 4 * trained + initial, what[1] + share),
        Part("their gradients", 4 * trained, f"float32{share}"),
        Part(f"{optimizer}'s state", states * trained, f"{states} bytes per trainable parameter{share}"),
    ]
    return [replace(part, size=-(-part.size // shards)) for part in whole]


def _which_layers(again: int, layers: int) -> str:
    if again in (0, layers):
        return "layer inputs" if again else "all layers"
    return f"inputs of {counted(again, 'layer')}, {layers - again} whole"


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


def _gathered(model: nn.Module, layers: list[nn.Module]) -> int:
    """Return the bytes that FSDP2 gathers at once: one layer, the prefetched next one, and embeddings and norms."""
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    return sum(p.nbytes for p in model.parameters()) - sum(sizes) + sum(sorted(sizes)[-2:])


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the frozen weights, or of all weights if none is frozen."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    return next((p.dtype for p in floating if not p.requires_grad), floating[0].dtype)


def _logits(size: Any, width: int, supervised: float, device: str) -> int:
    """Return the bytes of the chunks of logits and of the hidden states with their gradient."""
    chunk, float_chunk = (CPU_LOGITS, CPU_PROBABILITIES) if device == "cpu" else (DEVICE_LOGITS, DEVICE_LOGITS)
    logits = int(supervised) * size.vocab_size
    hidden = 2 * int(supervised) * size.hidden_size * width
    return int(min(chunk, logits) * width + 2 * min(float_chunk, logits) * 4 + hidden)


def _surgery(model: nn.Module, device: Literal["cpu", "cuda"]) -> int:
    """Return the memory of the largest decomposition, or of as many small ones as a CPU runs in parallel, in bytes."""
    needs, sizes = [], set()
    for layer in lora_layers(model).values():
        (out_features, in_features), groups = linear_shape(layer.base_layer), groups_of(layer.base_layer)
        for rows in layer.parts or (out_features // groups,):
            sizes.add(((rows, in_features), layer.r // groups))
    for shape, r in sizes:
        side_by_side = torch.get_num_threads() if device == "cpu" and cost(shape) <= SMALL else 1
        needs.append(side_by_side * decomposition_size(shape, device, r))
    return max(needs, default=0)


def decomposition_size(shape: tuple[int, int], device: Literal["cpu", "cuda"], r: int = 1) -> int:
    """Return the bytes that the decomposition of one weight takes, in addition to the weight.

    It needs a float64 copy and a Gram matrix. LAPACK works in place; the Krylov method also needs a Cholesky factor and
    copies of it; other devices compute all eigenvectors, for which their libraries need two more matrices. If about
    half of all triplets or more are wanted, all are computed on the CPU, which takes LAPACK's copy, all vectors, and
    the wanted ones. (Measured at 49152×576, r = 575: 743 MB.)

    Args:
        shape: Shape of the weight.
        device: Type of the device.
        r: Number of triplets.

    >>> round(decomposition_size((49152, 576), "cpu", r=575) / 1e6)
    803
    >>> [round(decomposition_size((4096, 11008), device) / 1e6) for device in ("cpu", "cuda")]
    [495, 898]
    """
    k, n = sorted(shape)
    if device == "cpu" and takes_all(k, r):
        return int(8 * k * n * 3.5 + 8 * 4 * k * k)
    matrices = 4.0 if device == "cuda" else 2.5 if suits_krylov(k, n) else 1.0
    return int(8 * k * n + 8 * matrices * k * k)
