"""Private APIs of torch, read in version 2.13."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard  # FSDP2's, of what is split already
from torch.nn.modules import module as module_tables
from torch.nn.modules.batchnorm import _NormBase as NormBase  # batch and instance norms, synchronized ones too
from torch.nn.modules.conv import _ConvNd as ConvNd  # all convolutions, lazy and transposed ones too
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNormParametrization
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader

__all__ = ["ConvNd", "NormBase", "SpectralNormParametrization", "StridedShard", "is_traceable_wrapper_subclass"]

COMPILED = "_orig_mod"
"""Under which ``torch.compile`` keeps a module (``torch._dynamo.eval_frame.OptimizedModule``)."""

FSDP_WRAPPED = "_fsdp_wrapped_module"
"""Under which FSDP1 does (``torch.distributed.fsdp._common_utils.FSDP_WRAPPED_MODULE``)."""

CHECKPOINT_WRAPPED = "_checkpoint_wrapped_module"
"""Under which activation checkpointing does (``checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE``)."""

PRODUCTS_ON_X86 = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}
"""Which questions in ``torch.cpu``, as far as a version has them, tell of instructions for products in a dtype."""

# (gradient, softmax's result, dimension, dtype of its input): what softmax's own backward calls.
softmax_backward = torch._softmax_backward_data
# (tensors, factor): multiplies all of them in place, as optimizers do.
multiply_together = torch._foreach_mul_
# (tensors, others): likewise subtracts from each tensor the other of its place.
subtract_together = torch._foreach_sub_


def own_convolution(module: Any) -> bool:
    """Whether a convolution computes what torch's class of its kind does: nothing in its class replaces that."""
    kind: Any = type(module)
    plain = next(base for base in kind.__mro__ if base in (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d))
    return bool(kind.forward is plain.forward and kind._conv_forward is plain._conv_forward)


def convolve(module: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve x with other filters than a convolution's own, and with all else as there: padding, stride, groups."""
    output: torch.Tensor = module._conv_forward(x, weight, None)
    return output


def bind_compiled(module: Any) -> None:
    """If a module is ``torch.compile``'s wrapper, make it call the module that is inside it now.

    The wrapper has bound the module that it was created with. Without Dynamo imported there are no wrappers.
    """
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None and isinstance(module, frames.OptimizedModule):
        module.__setstate__(module.__getstate__())


def transformed() -> bool:
    """Whether one of torch.func's transforms (grad, vmap, jvp) or forward-mode differentiation is active.

    They need operations that torch can differentiate or batch itself, and cannot use a custom
    ``torch.autograd.Function``, which makes the same check.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Leave torch.func's transforms and batched gradients, for work on tensors that have nothing to do with them."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    batched = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("VmapMode"))  # autograd.grad(is_grads_batched=True)
    with torch._C._ExcludeDispatchKeyGuard(batched), temporarily_clear_interpreter_stack():
        yield


def kept_factors(product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the two tensors whose product a tensor is, if autograd keeps both of them for that product's gradients.

    None if it does not (any more), if it keeps them in another way (by hooks, as activation checkpointing does, or on
    the CPU), if one of the three was written to afterwards, or if one is not of the product's shape: it may be a
    weight, which FSDP2 has in memory only while its module needs it.
    """
    if torch.compiler.is_compiling():
        return None
    node: Any = product.grad_fn
    if type(node).__name__ != "MulBackward0" or product._version:
        return None
    try:
        if node._raw_saved_self.unpack_hook is not None or node._raw_saved_other.unpack_hook is not None:
            return None
        one, other = node._saved_self, node._saved_other
    except RuntimeError:  # freed, or written to: whoever differentiates the product will be told
        return None
    if one is None or other is None or not one.shape == other.shape == product.shape:
        return None
    return one, other


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module runs hooks, registered on it or globally."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(module, f"_{kind}") or getattr(module_tables, f"_global_{kind}") for kind in kinds)


def flat_weights(rnn: Any) -> list[Any]:
    """Return the weights of a recurrent layer in the order in which its kernels take them."""
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]


def set_last_lr(schedule: LRScheduler, rates: list[float]) -> None:
    """Have ``get_last_lr`` of a schedule return other rates until its next step."""
    schedule._last_lr = [*rates]


def quiet_gathering() -> None:
    """Have torch not remark that it gathers along the dimensions of a mesh one by one, which nobody can change."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def reshard_settings(unit: Any) -> Callable[[], None]:
    """Return what gives a unit of FSDP2 its present settings of resharding after forward again."""
    state = unit._get_fsdp_state()
    groups = vars(state).get("_fsdp_param_groups") or [state._fsdp_param_group]  # older: one, or none
    groups = [group for group in groups if group is not None]
    meshes = [group.post_forward_mesh_info for group in groups]
    automatic = state._auto_reshard_after_forward

    def restore() -> None:
        state._auto_reshard_after_forward = automatic
        for group, mesh in zip(groups, meshes, strict=True):
            # Which unit is the root, and stays gathered, is found out in the first forward.
            group.post_forward_mesh_info = None if state._is_root and automatic else mesh

    return restore


def fsdp_name(name: str) -> str:
    """Return a parameter's name as FSDP1 has it in the state of optimizers."""
    from torch.distributed.fsdp._common_utils import clean_tensor_name

    return clean_tensor_name(name)


def forget_worker() -> None:
    """Have ``torch.utils.data.get_worker_info`` say that this process is no worker."""
    torch.utils.data._utils.worker._worker_info = None


def without_iterator(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a copy of a loader with persistent workers that has not been read from; read in torch 2.13."""
    apart = copy(loader)
    apart._iterator = None
    return apart
