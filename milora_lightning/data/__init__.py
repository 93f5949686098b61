"""Data for supervised fine-tuning: sources, prompt templates, tokenizing, batches and the data module."""

from milora_lightning.data.batching import Collator, EvaluationSampler, LengthGroupedSampler, PromptCollator
from milora_lightning.data.datamodule import SFTDataModule
from milora_lightning.data.files import Files
from milora_lightning.data.sources import Source
from milora_lightning.data.templates import TEMPLATES
from milora_lightning.data.tokenizing import tokenize_dataset
from milora_lightning.data.word_problems import WordProblems

__all__ = [
    "TEMPLATES",
    "Collator",
    "EvaluationSampler",
    "Files",
    "LengthGroupedSampler",
    "PromptCollator",
    "SFTDataModule",
    "Source",
    "WordProblems",
    "tokenize_dataset",
]
