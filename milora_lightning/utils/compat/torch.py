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

# FSDP2's placement of tensors that are already split.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.nn.modules import module as module_tables
from torch.nn.modules.batchnorm import _NormBase as NormBase  # batch and instance norms, synchronized ones too
from torch.nn.modules.conv import _ConvNd as ConvNd  # all convolutions, lazy and transposed ones too
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNormParametrization
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader

__all__ = ["ConvNd", "NormBase", "SpectralNormParametrization", "StridedShard", "is_traceable_wrapper_subclass"]

COMPILED = "_orig_mod"
"""Name of the module inside ``torch.compile``'s wrapper (``torch._dynamo.eval_frame.OptimizedModule``)."""

FSDP_WRAPPED = "_fsdp_wrapped_module"
"""The same for FSDP1 (``torch.distributed.fsdp._common_utils.FSDP_WRAPPED_MODULE``)."""

CHECKPOINT_WRAPPED = "_checkpoint_wrapped_module"
"""The same for activation checkpointing (``checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE``)."""

PRODUCTS_ON_X86 = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}
"""Functions in ``torch.cpu``, if the version has them, that report instructions for products in a dtype."""

# (gradient, softmax's result, dimension, dtype of its input): the operation in softmax's backward.
softmax_backward = torch._softmax_backward_data
# (tensors, factor): multiplies all tensors in place, as optimizers do.
multiply_together = torch._foreach_mul_
# (tensors, others): subtracts the corresponding other tensor from each, in place.
subtract_together = torch._foreach_sub_


def own_convolution(module: Any) -> bool:
    """Whether a convolution computes the same as torch's class: its own class overrides nothing."""
    kind: Any = type(module)
    plain = next(base for base in kind.__mro__ if base in (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d))
    return bool(kind.forward is plain.forward and kind._conv_forward is plain._conv_forward)


def convolve(module: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve x with other filters but a convolution's settings: padding, stride, groups.

    Args:
        module: The convolution, for its settings.
        x: Input (batch, in, *size).
        weight: The filters.
    """
    output: torch.Tensor = module._conv_forward(x, weight, None)
    return output


def bind_compiled(module: Any) -> None:
    """If a module is ``torch.compile``'s wrapper, make it call its current inner module.

    The wrapper stays bound to the module it was created with. If Dynamo is not imported, there are no wrappers.
    """
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None and isinstance(module, frames.OptimizedModule):
        module.__setstate__(module.__getstate__())


def transformed() -> bool:
    """Whether one of torch.func's transforms (grad, vmap, jvp) or forward-mode differentiation is active.

    They need operations that torch itself can differentiate or batch, not a custom ``torch.autograd.Function`` (which
    makes the same check).
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Suspend torch.func's transforms and batched gradients within this context, for tensors they do not concern."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    batched = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("VmapMode"))  # autograd.grad(is_grads_batched=True)
    with torch._C._ExcludeDispatchKeyGuard(batched), temporarily_clear_interpreter_stack():
        yield


def kept_factors(product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """If a tensor is a product of two tensors that autograd keeps for its gradients, return these.

    None if autograd does not keep them (any more), or keeps them in another form (by hooks, as in activation
    checkpointing, or on the CPU), if one of the three tensors was modified afterwards, or if a factor does not have the
    product's shape: it may be a weight, which FSDP2 keeps in memory only while its module needs it.
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
    except RuntimeError:  # freed or modified: backward through the product will report it
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
    """Make a schedule's ``get_last_lr`` return these rates until its next step.

    Args:
        schedule: The schedule.
        rates: The learning rate of each group.
    """
    schedule._last_lr = [*rates]


def quiet_gathering() -> None:
    """Suppress torch's remark that it gathers along one mesh dimension after another, which users cannot change."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def reshard_settings(unit: Any) -> Callable[[], None]:
    """Return a function that restores an FSDP2 unit's present settings of resharding after forward."""
    state = unit._get_fsdp_state()
    groups = vars(state).get("_fsdp_param_groups") or [state._fsdp_param_group]  # older: one, or none
    groups = [group for group in groups if group is not None]
    meshes = [group.post_forward_mesh_info for group in groups]
    automatic = state._auto_reshard_after_forward

    def restore() -> None:
        state._auto_reshard_after_forward = automatic
        for group, mesh in zip(groups, meshes, strict=True):
            # The root unit, which stays gathered, is determined in the first forward.
            group.post_forward_mesh_info = None if state._is_root and automatic else mesh

    return restore


def fsdp_name(name: str) -> str:
    """Return a parameter's name as FSDP1 writes it in optimizer states."""
    from torch.distributed.fsdp._common_utils import clean_tensor_name

    return clean_tensor_name(name)


def forget_worker() -> None:
    """Make ``torch.utils.data.get_worker_info`` report that this process is not a worker."""
    torch.utils.data._utils.worker._worker_info = None


def without_iterator(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a copy, not yet read from, of a loader with persistent workers."""
    apart = copy(loader)
    apart._iterator = None
    return apart
