"""What monitors of language models share: which model and tokenizer they take, and what they refuse."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.export.models import find_model
from milora_lightning.models.pretrained import load_tokenizer
from milora_lightning.utils.errors import InvalidInputError


def check_alone(trainer: Trainer, monitor: Callback, remedy: str) -> None:
    """Refuse a second monitor of a kind: both would log under the same names, of which Lightning logs the mean.

    Args:
        trainer: The Trainer.
        monitor: The monitor, one of its callbacks.
        remedy: What one monitor takes instead.

    Raises:
        ValueError: If the Trainer has another one.
    """
    kind = [callback for callback in trainer.callbacks if type(callback) is type(monitor)]  # type: ignore[attr-defined]
    if len(kind) > 1 and monitor in kind:
        raise InvalidInputError(
            f"There are two callbacks {type(monitor).__name__}, which would log under the same names: {remedy}."
        )


def mark_of(module: LightningModule) -> object:
    """Return an object that a module keeps and no other one has, by which what was read for it is told apart."""
    mark: object = vars(module).setdefault("_measured_as", object())
    return mark


def language_model_of(module: LightningModule, monitor: str) -> PreTrainedModel:
    """Return the causal language model in a module, for a monitor.

    Raises:
        ValueError: If there is none, or it is not clear which of several is meant.
    """
    model = find_model(
        module,
        f"{monitor} measures language models of transformers alone: leave it out",
        "have adapters on the one to measure, MiLoRAInit(module=...)",
    )
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise InvalidInputError(
            f"{type(model).__name__} is no causal language model, and {monitor} measures those alone: leave it out."
        )
    return model


def tokenizer_of(module: LightningModule, name: str | None, monitor: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model of that name, or the module's own, for a monitor.

    Raises:
        ValueError: If there is neither.
    """
    tokenizer = load_tokenizer(name) if name else getattr(module, "tokenizer", None)
    if tokenizer is None:
        raise InvalidInputError(
            f"{type(module).__name__} has no attribute tokenizer: pass the name of the model whose tokenizer to "
            f"use, {monitor}(tokenizer=...)."
        )
    return tokenizer
