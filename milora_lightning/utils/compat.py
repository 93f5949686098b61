"""Private APIs of other packages, in one place, with the versions in which they were read.

This is the file to check after an upgrade. Read in torch 2.13, lightning 2.6, transformers 5.23, datasets 5.2
and jsonargparse 4.53. No more than torch is imported with it; the others by the functions, or not at all.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import datasets
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.trainer.states import TrainerFn
    from transformers import PreTrainedModel

__all__ = ["ConvNd", "NormBase", "SpectralNormParametrization", "StridedShard", "is_traceable_wrapper_subclass"]

USED_IN_PLACE = {
    # torch.nn.Module's own tables, whose public iterators leave out None, and what is registered twice; its seams for
    # subclasses. All of them as old as the class, and used by everybody.
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_pre_hooks",
    "_apply",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "_metadata",
    # How often a tensor was written to, as torch's notes on autograd describe it.
    "_version",
    # Attributes of Lightning's strategies and LightningCLI, and of jsonargparse's parsers, in subclasses of ours.
    "_data_parallel_size",
    "_tensor_parallel_size",
    "_save_distributed_checkpoint",
    "_state_dict_type",
    "_registered_strategies",
    "_parser",
    "_get",
    "_subcommand_parsers",
    "_run_subcommand",
    "_prepare_subcommand_kwargs",
    "_parse_ckpt_path",
    "_call_batch_hook",
    "_split_lines",
    "_actions",
    "_typehint",
    # typing's mark of a protocol.
    "_is_protocol",
}
"""Private names that stand where they are needed, because a function around each would say less than the name."""

# ---- torch ----

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

TELLS_HOW_IT_KEEPS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")
"""Whether autograd tells if it keeps a tensor itself or leaves that to hooks; not so in torch 2.6."""

# (gradient, softmax's result, dimension, dtype of its input): what softmax's own backward calls.
softmax_backward = torch._softmax_backward_data
# (tensors, factor): multiplies all of them in place, as optimizers do.
multiply_together = torch._foreach_mul_


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
    if not TELLS_HOW_IT_KEEPS or torch.compiler.is_compiling():
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
    groups = [
        group for group in vars(state).get("_fsdp_param_groups") or [state._fsdp_param_group] if group is not None
    ]
    meshes = [group.post_forward_mesh_info for group in groups]
    automatic = vars(state).get("_auto_reshard_after_forward", True)  # always so before torch 2.8

    def restore() -> None:
        if "_auto_reshard_after_forward" in vars(state):
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


# ---- Lightning ----


def is_sharded_folder(path: Path) -> bool:
    """Whether a folder is one into which the ranks of a sharded run have written a checkpoint."""
    from lightning.fabric.strategies.fsdp import _is_sharded_checkpoint

    return _is_sharded_checkpoint(path)


def metadata_file(folder: Path) -> Path:
    """Return the file of such a folder that holds what is no tensor."""
    from lightning.fabric.utilities.load import _METADATA_FILENAME

    return folder / _METADATA_FILENAME


def read_sharded_folder(folder: Path) -> dict[str, Any]:
    """Read such a folder in one process."""
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    return _load_distributed_checkpoint(folder)


def whole_optimizer_states(model: nn.Module, world_size: int) -> AbstractContextManager[None]:
    """Have FSDP1 take and give states of optimizers whole, on all ranks."""
    from lightning.fabric.strategies.fsdp import _get_full_state_dict_context

    context: Any = _get_full_state_dict_context(model, world_size=world_size, rank0_only=False)
    return context  # type: ignore[no-any-return]


def is_placeholder(optimizer: object) -> bool:
    """Whether an optimizer stands in for none, where ``configure_optimizers`` returns nothing."""
    from lightning.pytorch.core.optimizer import _MockOptimizer

    return isinstance(optimizer, _MockOptimizer)


def current_hook(module: LightningModule) -> str | None:
    """Return the name of the hook in which the Trainer is calling a module."""
    return module._current_fx_name


def logged_step(trainer: Trainer) -> int:
    """The step under which Lightning logs what is measured now: counted from 0, and by steps of all optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def find_by_keyword(trainer: Trainer, keyword: str, function: TrainerFn) -> Any:
    """Return the path of the checkpoint that ``ckpt_path=keyword`` means for a Trainer, or None.

    Raises:
        ValueError: If there is none.
    """
    find = trainer._checkpoint_connector._parse_ckpt_path
    return find(function, keyword, model_provided=True, model_connected=False)


def checkpoint_being_loaded(trainer: Trainer) -> dict[str, Any]:
    """Return the content of the checkpoint that a Trainer is restoring."""
    return trainer._checkpoint_connector._loaded_checkpoint


def averaged_model(callback: Any) -> Any:
    """Return the average of WeightAveraging or StochasticWeightAveraging, or None before there is one."""
    return callback._average_model


def change_average(callback: Any, change: Any) -> None:
    """Replace the function by which StochasticWeightAveraging averages by what ``change`` makes of it."""
    callback._avg_fn = change(callback._avg_fn)


def numbers_versions(callback: ModelCheckpoint) -> bool:
    """Whether a ModelCheckpoint gives a file another name where there is one of the same."""
    return callback._enable_version_counter


def expect_processes_to_end() -> None:
    """Have Lightning not take the end of processes that it has started for a failure, for which it would kill this one.

    Its thread that watches them sees them killed where Lightning itself ends a run on Ctrl-C.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def options_of_wandb(logger: WandbLogger) -> dict[str, Any]:
    """Return the options with which a logger will begin its run, to be changed."""
    return logger._wandb_init


# ---- transformers ----


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of the attention that a model uses."""
    return str(model.config._attn_implementation)


def takes_sdpa(kind: type[PreTrainedModel]) -> bool:
    """Whether a class of models computes attention by torch's function, or by one registered in its place."""
    return bool(kind._supports_sdpa) and bool(kind._supports_attention_backend)


def takes_flash_attention(kind: type[PreTrainedModel]) -> bool:
    """Whether a class of models has been made for flash attention."""
    return bool(kind._supports_flash_attn)


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """Return which weights a model keeps in float32 whatever dtype it is loaded in; nothing if there are none."""
    return model._get_dtype_plan(dtype)


def decoder_layer_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the classes of layers that are not to be split among devices."""
    return set(model._no_split_modules or ())


def takes_dynamic_cache(model: PreTrainedModel) -> bool:
    """Whether a model generates with transformers' own growing cache."""
    return bool(model._supports_default_dynamic_cache())


# ---- datasets, jsonargparse ----


def fingerprint_of(dataset: datasets.Dataset) -> str:
    """Return what names a dataset's content in the cache of datasets."""
    return str(dataset._fingerprint)


def option_strings(parser: Any) -> set[str]:
    """Return all options of a parser, as they are written."""
    return {option for action in parser._actions for option in action.option_strings}


def class_resolver() -> Callable[[Any, str], str]:
    """Return what jsonargparse calls to find the full path of a class that is given by its name, and by its base."""
    from jsonargparse import _typehints

    return _typehints.resolve_class_path_by_name


def set_class_resolver(resolve: Callable[[Any, str], str]) -> None:
    """Have jsonargparse call something else for it."""
    from jsonargparse import _typehints

    _typehints.resolve_class_path_by_name = resolve  # type: ignore[assignment]
