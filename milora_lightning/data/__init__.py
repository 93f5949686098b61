"""Data for supervised fine-tuning: sources, prompt templates, tokenizing, batches and the data module."""

from milora_lightning.data.batches.batching import Collator, PromptCollator
from milora_lightning.data.batches.choices import ChoiceCollator
from milora_lightning.data.batches.sampling import EvaluationSampler, LengthGroupedSampler
from milora_lightning.data.datamodule import SFTDataModule
from milora_lightning.data.encoding.templates import TEMPLATES
from milora_lightning.data.files import Files
from milora_lightning.data.mixture import Mixture
from milora_lightning.data.sources import MultipleChoice, Source, Task
from milora_lightning.data.tasks.code import Code
from milora_lightning.data.tasks.commonsense import Commonsense
from milora_lightning.data.tasks.follow_bench import FollowBench
from milora_lightning.data.tasks.instructions import Instructions
from milora_lightning.data.tasks.mathematics import Math
from milora_lightning.data.tasks.visual import VisualInstructions
from milora_lightning.data.tasks.word_problems import WordProblems
from milora_lightning.data.tokenizing import tokenize_dataset

__all__ = [
    "TEMPLATES",
    "ChoiceCollator",
    "Code",
    "Collator",
    "Commonsense",
    "EvaluationSampler",
    "Files",
    "FollowBench",
    "Instructions",
    "LengthGroupedSampler",
    "Math",
    "Mixture",
    "MultipleChoice",
    "PromptCollator",
    "SFTDataModule",
    "Source",
    "Task",
    "VisualInstructions",
    "WordProblems",
    "tokenize_dataset",
]
