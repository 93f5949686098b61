"""Torchmetrics metrics for fine-tuned language models: answer accuracy and forgetting."""

from milora_lightning.metrics.answers import AnswerAccuracy, extract_answer, right_answer, same_answer
from milora_lightning.metrics.choices import extract_choice, right_choice
from milora_lightning.metrics.code import PassRate, pass_at_k, pass_rates
from milora_lightning.metrics.forgetting import Forgetting
from milora_lightning.metrics.latex import extract_solution, right_solution, same_latex
from milora_lightning.metrics.metamath import right_expression, right_number
from milora_lightning.metrics.tasks import TaskAccuracy

__all__ = [
    "AnswerAccuracy",
    "Forgetting",
    "PassRate",
    "TaskAccuracy",
    "extract_answer",
    "extract_choice",
    "extract_solution",
    "pass_at_k",
    "pass_rates",
    "right_answer",
    "right_choice",
    "right_expression",
    "right_number",
    "right_solution",
    "same_answer",
    "same_latex",
]
