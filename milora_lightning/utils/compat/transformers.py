"""Private APIs of transformers, read in version 5.23."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of a model's attention implementation."""
    return str(model.config._attn_implementation)


def takes_sdpa(kind: type[PreTrainedModel]) -> bool:
    """Whether a model class can compute attention by torch's function, or by a registered replacement of it."""
    return bool(kind._supports_sdpa) and bool(kind._supports_attention_backend)


def takes_flash_attention(kind: type[PreTrainedModel]) -> bool:
    """Whether a model class supports flash attention."""
    return bool(kind._supports_flash_attn)


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """Return the weights that a model keeps in float32 whatever dtype it is loaded in; falsy if there are none.

    Args:
        model: The model.
        dtype: The dtype in which it is loaded.
    """
    return model._get_dtype_plan(dtype)


def decoder_layer_names(model: PreTrainedModel) -> set[str]:
    """Return the class names of layers that must not be split across devices."""
    return set(model._no_split_modules or ())


def takes_dynamic_cache(model: PreTrainedModel) -> bool:
    """Whether a model generates with transformers' ``DynamicCache``."""
    return bool(model._supports_default_dynamic_cache())


@contextmanager
def written_as_it_is(model: Any) -> Iterator[None]:
    """Within this context, ``save_pretrained`` writes a model that was dequantized on loading in its dequantized form.

    A model remembers how its parameters were converted from the files, and would reverse this: back to FP8 codes, which
    lose an update, or, as the conversion from MXFP4 cannot be reversed, to the codes' names without their format.
    """
    conversions = getattr(model, "_weight_conversions", None) or ()
    operations = [operation for each in conversions for operation in getattr(each, "operations", None) or ()]
    of_quantizers = any(type(operation).__module__.startswith("transformers.integrations.") for operation in operations)
    if not of_quantizers or any(parameter.element_size() < 2 for parameter in model.parameters()):  # some codes remain
        yield
        return
    model._weight_conversions = None  # as in a model that was not loaded: experts are still converted as usual
    try:
        yield
    finally:
        model._weight_conversions = conversions
