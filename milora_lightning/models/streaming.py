"""Loading of pretrained models under FSDP2: built without weights, sharded, then filled shard by shard."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from milora_lightning.adapters.freezing import base_keys
from milora_lightning.models.files import clear_errors, weight_files
from milora_lightning.models.pretrained import load_causal_lm, load_config, locate
from milora_lightning.parallel.dtensor import as_bytes, copy_into, home, local_slices
from milora_lightning.parallel.work import raise_on_all_ranks
from milora_lightning.utils.compat.transformers import kept_in_float32
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import pristine_name, unwrapped_name
from milora_lightning.utils.precision import dtype_of


def empty_causal_lm(
    name_or_path: str, dtype: torch.dtype | str = "auto", attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build a causal language model with parameters on the meta device and real buffers.

    Args:
        name_or_path: As for :func:`milora_lightning.models.pretrained.load_causal_lm`.
        dtype: As for that function.
        attn_implementation: As for that function.

    Returns:
        The model, in eval mode; :func:`stream_weights` fills it.

    Raises:
        FileNotFoundError: If there is no such model, locally or on the Hub.
        ValueError: If it is quantized, or keeps some of its weights in float32 in a half-precision model.
    """
    location = locate(name_or_path)
    config = load_config(name_or_path)
    if dtype == "auto":
        dtype = config.dtype or "float32"
    dtype = dtype_of(dtype)
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidInputError(
            f"{location!r} is quantized, and its codes cannot be read into shards as weights: use an unquantized "
            "model, or strategy: ddp."
        )
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    if kept_in_float32(model, dtype):
        raise InvalidInputError(
            f"{type(model).__name__} keeps some weights in float32 in a {dtype} model, which cannot be sharded while "
            "it is read: use dtype: float32, or strategy: ddp."
        )
    model.tie_weights()  # building on the meta device has untied them
    model.config.name_or_path = location
    with suppress(OSError):  # most models have one
        model.generation_config = GenerationConfig.from_pretrained(location)
    return model.eval()


def stream_weights(model: PreTrainedModel, name_or_path: str, device: torch.device, cpu_offload: bool = False) -> None:
    """Fill a sharded model that has no weights yet; all ranks must call this.

    Each rank reads its own shards if the tensors in the safetensors files are the model's parameters. If not (other
    names, other formats), the first rank loads the whole model and broadcasts one weight at a time.

    Args:
        model: A model from :func:`empty_causal_lm`, sharded by FSDP2. The adapters' factors become zero.
        name_or_path: As for :func:`empty_causal_lm`.
        device: Where to put the shards.
        cpu_offload: Whether to put them on the CPU instead, as FSDP2's ``CPUOffloadPolicy`` requires.

    Raises:
        ValueError: On all ranks, if the weights cannot be read on one.
    """

    def placed(tensor: Tensor) -> Tensor:
        place = "cpu" if cpu_offload and isinstance(tensor, DTensor) else device
        return torch.empty_like(tensor, device=place) if tensor.is_meta else tensor.to(place)

    model._apply(placed)  # tied weights stay tied: for sharded parameters, _apply replaces the data
    names: dict[Tensor, list[str]] = defaultdict(list)  # several for a tied weight
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in sorted(base_keys(model, frozen_only=False)):
        names[parameters[key]].append(pristine_name(key))
    for parameter in model.parameters():
        if parameter not in names:
            copy_into(parameter, torch.zeros(1).expand(parameter.shape))
    location = locate(name_or_path)
    with clear_errors(name_or_path, location):
        files = weight_files(location)
    found = {parameter: next((key for key in keys if key in files), "") for parameter, keys in names.items()}
    buffers = {buffer: unwrapped_name(name) for name, buffer in model.named_buffers()}
    if all(found.values()):
        with clear_errors(name_or_path, location):
            _read_shards({**found, **{buffer: name for buffer, name in buffers.items() if name in files}}, files)
    else:
        _broadcast_model({**{parameter: keys[0] for parameter, keys in names.items()}, **buffers}, name_or_path)


@torch.no_grad()
def _read_shards(names: dict[Tensor, str], files: dict[str, str]) -> None:
    """Read this rank's shards of the named tensors."""
    for path in sorted({files[name] for name in names.values()}):
        with safe_open(path, "pt") as file:
            for tensor, name in names.items():
                if files[name] == path:
                    stored = file.get_slice(name)
                    if tuple(stored.get_shape()) != tensor.shape:
                        raise InvalidInputError(
                            f"{name!r} has the shape {stored.get_shape()} in {path!r}, but the model needs "
                            f"{list(tensor.shape)}: use files that belong to the model's config.json."
                        )
                    part = stored[local_slices(tensor)] if tensor.ndim else file.get_tensor(name)
                    (tensor.to_local() if isinstance(tensor, DTensor) else tensor).copy_(part)


def _broadcast_model(names: dict[Tensor, str], name_or_path: str) -> None:
    """Load the model on the first rank, and broadcast the named tensors one at a time."""
    loaded, error = {}, None
    if dist.get_rank() == 0:
        try:
            model = load_causal_lm(name_or_path, next(p.dtype for p in names if p.is_floating_point()))
            loaded = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        except Exception as raised:  # any error, because the other ranks wait for this one
            error = raised
    raise_on_all_ranks(error, dist.get_world_size())
    for tensor, name in names.items():
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=home(tensor))
        if loaded:
            value.copy_(loaded[name].detach())
        dist.broadcast(as_bytes(value), src=0)
        copy_into(tensor, value)
