"""The attention implementation that ``attn_implementation: auto`` selects."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from milora_lightning.models.attention import NAME as CAUSAL_BLOCKS
from milora_lightning.utils.compat.transformers import takes_flash_attention, takes_sdpa

AUTO = "auto"
FLASH_HEAD_DIM = 256  # the largest that flash attention supports


class Choice(NamedTuple):
    """The chosen implementation (None for transformers' default), and the reason."""

    name: str | None
    reason: str

    @property
    def in_words(self) -> str:
        """A line for the user."""
        return "Attention: " + (self.reason if self.name is None else f"{self.name}, {self.reason}") + "."


def choose_attention(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Choice:
    """Choose an implementation that computes the same as transformers' default, up to rounding, and is faster.

    Args:
        config: The model's configuration.
        dtype: The dtype of its weights.
        device: The device that it computes on.
    """
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    kind: type[PreTrainedModel] | None = kinds[0] if isinstance(kinds, tuple) else kinds
    if kind is None or not takes_sdpa(kind) or hasattr(config, "vision_config"):
        return Choice(None, f"transformers' choice for models of type {config.model_type}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return Choice("eager", "the only one that caps attention scores")  # older transformers would take sdpa
    if device.type == "cpu":
        return Choice(CAUSAL_BLOCKS, "the fastest in training on CPUs")
    if device.type != "cuda":
        return Choice(None, f"transformers' choice on {device.type}")
    if (missing := _missing_for_flash(kind, config, dtype, device)) is not None:
        return Choice(None, f"transformers' choice; flash attention {missing}")
    hopper = torch.cuda.get_device_capability(device)[0] == 9 and is_flash_attn_3_available()
    return Choice(f"flash_attention_{3 if hopper else 2}", "whose package is installed")


def _missing_for_flash(
    kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return the reason why flash attention cannot be used; None if it can."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    capability = torch.cuda.get_device_capability(device)
    if not takes_flash_attention(kind):
        return f"is not supported by {kind.__name__}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs a half-precision model"
    if head_dim is None or head_dim > FLASH_HEAD_DIM:
        return f"has no kernel for heads of {head_dim} features"
    if capability[0] < 8:
        return "needs a GPU of compute capability 8.0 or newer"
    if not (is_flash_attn_2_available() or (capability[0] == 9 and is_flash_attn_3_available())):
        return "needs the package flash-attn"
    return None
