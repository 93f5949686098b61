"""The adapter layer: a frozen linear layer plus a trainable low-rank update of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from milora_lightning.adapters.autograd import lora_linear
from milora_lightning.adapters.dropout import draw_mask, masked
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.linear_layers import is_conv1d, is_linear
from milora_lightning.adapters.merged_product import MergedProduct, merged_weight
from milora_lightning.adapters.quantization import holds_its_weight, is_plain
from milora_lightning.config import Init
from milora_lightning.parallel.dtensor import fill, full_tensor, is_sharded
from milora_lightning.utils.compat import is_hooked, transformed
from milora_lightning.utils.errors import InvalidInputError

INITIALIZED = "initialized"
"""What a state dict calls it that an adapter's factors have had their initial values."""

PLAIN_LAYERS = (nn.Linear, NonDynamicallyQuantizableLinear)


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update that starts at zero.

    Computes, for the frozen weight W of ``base_layer`` and s = lora_alpha / r,

        y = W x + s (B A − B₀A₀) x + bias

    with the initial factors A₀, B₀ frozen beside the trainable A, B. This is MiLoRA's layer (arXiv 2406.09044,
    equation 5, with W − s·B₀A₀ as the frozen principal part) without the rounding that writing W − s·B₀A₀ into a
    half-precision weight would cost: the weight is never written, and the layer starts at the pretrained one
    exactly. With ``init="lora"`` there are no initial factors, as B₀A₀ is zero.

    The factors are float32 (float64 in a float64 model) whatever the dtype of the base layer; products are formed
    in the dtype of the input, or autocast's.

    Args:
        base_layer: ``nn.Linear`` or a subclass of it, or Hugging Face's ``Conv1D``.
        r: Rank of the factors.
        lora_alpha: Numerator of the scale; defaults to ``r``.
        lora_dropout: Probability with which features of the update's input are dropped in training.
        init: Where the factors will start; filled by :func:`milora_lightning.initialize`. Until then they are
            zero and the layer computes what ``base_layer`` does.

    Attributes:
        lora_A: Trainable factor (r, in).
        lora_B: Trainable factor (out, r).
        initial_A: Frozen initial value of ``lora_A``, or None.
        initial_B: Frozen initial value of ``lora_B``, or None.
        enabled: Whether the update is applied; see :func:`milora_lightning.adapters_disabled`.
        initialized: Whether the factors have their initial values.

    Raises:
        TypeError: If ``base_layer`` is no linear layer.
    """

    _merged: MergedProduct | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        init: Init = "milora",
    ) -> None:
        super().__init__()
        if not is_linear(base_layer):
            raise TypeError(f"LoRALinear adapts nn.Linear or Conv1D layers, not {type(base_layer).__name__}.")
        self.base_layer = base_layer
        self.r = r
        self.lora_alpha = float(r if lora_alpha is None else lora_alpha)
        self.scaling = self.lora_alpha / r
        self.lora_dropout = lora_dropout
        self.init = init
        self.enabled = True
        self.initialized = False
        self.transposed = is_conv1d(base_layer)
        self.out_features, self.in_features = linear_shape(base_layer)

        def factor(*shape: int, trainable: bool) -> nn.Parameter:
            zeros = torch.zeros(shape, dtype=torch.float32, device=base_layer.weight.device)
            return nn.Parameter(zeros, requires_grad=trainable)

        self.lora_A = factor(r, self.in_features, trainable=True)
        self.lora_B = factor(self.out_features, r, trainable=True)
        self.initial_A: nn.Parameter | None = None
        self.initial_B: nn.Parameter | None = None
        if init != "lora":
            # Parameters, not buffers: DDP would broadcast buffers at every step.
            self.initial_A = factor(r, self.in_features, trainable=False)
            self.initial_B = factor(self.out_features, r, trainable=False)

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings by name, as :meth:`milora_lightning.LoRAConfig.settings` has them."""
        return {"r": self.r, "lora_alpha / r": self.scaling, "lora_dropout": self.lora_dropout, "init": self.init}

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output of shape (..., out) for an input of shape (..., in)."""
        if not self.enabled:
            return cast(Tensor, self.base_layer(x))
        if self.training and torch.is_grad_enabled() and not self.initialized:
            raise RuntimeError(
                "This LoRALinear has no initial factors yet and would not train: call "
                "milora_lightning.initialize(model) after inject, or add the MiLoRAInit callback to the Trainer."
            )
        if transformed() or not self._base_is_plain():
            return self._beside_base(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base, (mask, scaling) = self.base_layer, self._dropout_mask(x)
        if mask is None and not torch.is_grad_enabled() and (merged := self._merged_for(x)) is not None:
            return merged(x, base.bias)
        return lora_linear(x, base.weight, base.bias, *self.factors, mask, scaling, self.transposed)

    def merge(self) -> None:
        """Form W + ΔW once, where each call would form the update: for generation, whose calls are many and small.

        Serves calls without gradients alone; training, a state dict, an export or :func:`adapters_disabled` do not know
        of it. The weight is not written: the sum takes the memory of a second one. A half-precision sum would round the
        update, so that in half precision its factors are stacked and cast once instead, and outputs stay the same bit
        for bit. When the factors or the weight change, the next call merges anew. (Only what is written through
        ``tensor.data`` goes unseen: call this again after it.)

        Does nothing where the weight is quantized, or in shards, which FSDP makes whole for a call only.
        """
        tensors = [t for t in (self.base_layer.weight, *self.factors) if t is not None]
        shards = is_sharded(self) or self.lora_A.ndim != 2  # FSDP1's are flat
        self._merged = None
        if holds_its_weight(self.base_layer) and not shards and not any(t.is_inference() for t in tensors):
            self._merged = MergedProduct(self.base_layer.weight, self.factors, self.scaling, self.transposed)

    def unmerge(self) -> None:
        """Let go of what :meth:`merge` has formed."""
        self._merged = None

    @property
    def merged(self) -> bool:
        """Whether calls without gradients compute with what :meth:`merge` has formed."""
        return self._merged is not None

    def update(self, x: Tensor) -> Tensor:
        """Compute the update's part of the output, s (B A − B₀A₀) x, of shape (..., out).

        This is the formula of the class in plain differentiable operations: the reference for the fused path, and
        what is added to the output of a base layer that only its own code can evaluate (a quantised one).
        """
        mask, scaling = self._dropout_mask(x)
        A, B = stack_factors(*self.factors, scaling, x.dtype)
        return F.linear(F.linear(masked(x, mask), A), B)

    def delta_weight(self) -> Tensor:
        """Compute ΔW = s (B A − B₀A₀), of shape (out, in), in the factors' precision."""
        A, B = stack_factors(*self.factors, self.scaling)
        return B @ A

    def merged_weight(self) -> Tensor:
        """Compute W + ΔW in float32 and round it once to W's dtype; in the base layer's own layout.

        Raises:
            ValueError: If the base layer holds codes, which would have to be rounded again.
        """
        weight: Tensor = self.base_layer.weight
        if not holds_its_weight(self.base_layer):
            raise InvalidInputError(
                f"The weight of a {type(self.base_layer).__name__} is quantized and cannot be merged."
            )
        return merged_weight(weight, self.factors, self.scaling, self.transposed).to(weight.dtype)

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The trainable factors and their initial values, in the order in which they are stacked."""
        return self.lora_A, self.lora_B, self.initial_A, self.initial_B

    @property
    def weight(self) -> Tensor:
        """The weight of the function this layer computes, in the base layer's layout and dtype.

        Lets modules that read ``layer.weight`` instead of calling the layer (``nn.MultiheadAttention``, the fast
        path of ``nn.TransformerEncoderLayer``) compute with the update, and train it. Dropout does not apply to
        this use, and a half-precision weight rounds the update.
        """
        weight: Tensor = self.base_layer.weight
        if not self.enabled or not holds_its_weight(self.base_layer):  # a quantized weight's codes stay what they are
            return weight
        return self.merged_weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return cast("Tensor | None", self.base_layer.bias)

    @torch.no_grad()
    def set_initial_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Start training from these factors, of shapes (r, in) and (out, r): the update is zero here."""
        fill(self.lora_A, lora_A)
        fill(self.lora_B, lora_B)
        if self.initial_A is not None and self.initial_B is not None:
            self.initial_A.copy_(self.lora_A)
            self.initial_B.copy_(self.lora_B)
        self.initialized = True

    def extra_repr(self) -> str:
        """Describe the adapter when the model is printed."""
        return f"r={self.r}, lora_alpha={self.lora_alpha:g}, lora_dropout={self.lora_dropout:g}, init={self.init!r}"

    def _dropout_mask(self, x: Tensor) -> tuple[Tensor | None, float]:
        """Draw the features to keep, and return the scale that makes up for the dropped ones."""
        if not self.training or self.lora_dropout == 0:
            return None, self.scaling
        mask, keep = draw_mask(x, self.lora_dropout)
        return mask, self.scaling / keep

    def _merged_for(self, x: Tensor) -> MergedProduct | None:
        """What :meth:`merge` has formed, if it is of use for x; anew where something has changed since."""
        if torch.compiler.is_compiling() or self._merged is None:
            return None
        if not self._merged.is_of(self.base_layer.weight, self.factors):
            self.merge()
        return self._merged if self._merged is not None and self._merged.dtype == x.dtype else None  # not in autocast

    def _beside_base(self, x: Tensor) -> Tensor:
        """Let the base layer compute its part by its own code, and add the update."""
        y, update = self.base_layer(x), self.update(x)
        if y.shape != update.shape:
            raise InvalidInputError(
                f"A {type(self.base_layer).__name__} turns inputs of shape {tuple(x.shape)} into {tuple(y.shape)}, "
                f"not {tuple(update.shape)}: it is more than a matrix product, and cannot have an adapter. Leave "
                "it out of target_modules."
            )
        return cast(Tensor, y + update.to(y.dtype))

    def _base_is_plain(self) -> bool:
        """Whether the base layer multiplies by its weight and adds its bias, nothing else, and all of it is frozen."""
        base = self.base_layer
        changed = "forward" in vars(base) or is_hooked(base)
        conv1d = self.transposed and type(base).__module__ == "transformers.pytorch_utils"
        if not (type(base) in PLAIN_LAYERS or conv1d) or changed or not is_plain(base.weight):
            return False
        frozen = (base.weight, base.bias, self.initial_A, self.initial_B)
        return not any(tensor is not None and tensor.requires_grad for tensor in frozen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        # Half-precision plugins cast whole models; the factors and their optimizer state stay in full precision.
        def in_full_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype.itemsize < tensor.dtype.itemsize:
                return tensor.to(result.device)
            return result

        if recurse:
            self.base_layer._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(in_full_precision, recurse=False)  # type: ignore[no-untyped-call]
        return self

    # A state dict holds no more than the parameters; whether they are initial values goes into its metadata, as torch's
    # own versions do. A description of the adapters (AdapterCheckpoint) brings it as an entry.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][INITIALIZED] = self.initialized

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        told = state_dict.pop(prefix + INITIALIZED, local_metadata.get(INITIALIZED))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if f"{prefix}lora_A" in state_dict:
            self.initialized = bool(told) or factors_tell(state_dict, prefix)


def factors_tell(state: Mapping[str, Any], prefix: str) -> bool:
    """Whether factors in a state dict have been given values: they are zero until then, all of them.

    Not the other way round: that all are zero need not mean that none has been given.

    >>> factors_tell({"0.lora_A": torch.zeros(1, 2), "0.lora_B": torch.ones(2, 1)}, "0.")
    True
    """
    factors = (state.get(prefix + name) for name in ("lora_A", "lora_B", "initial_A", "initial_B"))
    return any(bool(full_tensor(f).any()) for f in factors if f is not None and not f.is_meta)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear layer, from its attributes: a quantised weight has another shape."""
    if is_conv1d(layer):
        return cast(int, layer.nf), cast(int, layer.nx)
    return cast(int, layer.out_features), cast(int, layer.in_features)
