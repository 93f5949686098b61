"""Causal language models from Hugging Face: loading, the training loss, generation and memory estimates."""

from milora_lightning.models.attention import causal_attention
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.pretrained import load_causal_lm, load_tokenizer

__all__ = ["causal_attention", "causal_lm_loss", "load_causal_lm", "load_tokenizer"]
