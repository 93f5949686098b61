"""Private APIs of transformers, read in version 5.23."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


@contextmanager
def written_as_it_is(model: Any) -> Iterator[None]:
    """Within this context, ``save_pretrained`` writes a model that was dequantized while loading as if it never was.

    A model remembers how its files' tensors became its own, and would take them back: to FP8 codes again, which lose
    an update, or, as MXFP4 has no way back, to the names of codes without their format.
    """
    conversions = getattr(model, "_weight_conversions", None) or ()
    operations = [operation for each in conversions for operation in getattr(each, "operations", None) or ()]
    of_quantizers = any(type(operation).__module__.startswith("transformers.integrations.") for operation in operations)
    if not of_quantizers or any(parameter.element_size() < 2 for parameter in model.parameters()):  # codes are left
        yield
        return
    model._weight_conversions = None  # that of a model which was not loaded: experts become files' tensors as usual
    try:
        yield
    finally:
        model._weight_conversions = conversions
