"""Torchmetrics metrics for fine-tuned language models."""

from milora_lightning.metrics.answers import AnswerAccuracy, extract_answer, same_answer

__all__ = ["AnswerAccuracy", "extract_answer", "same_answer"]
