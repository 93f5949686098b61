"""Shared parts of monitors of language models: finding the model and tokenizer, and checks."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.export.models import find_model
from milora_lightning.models.pretrained import load_tokenizer
from milora_lightning.utils.errors import InvalidInputError


def check_alone(trainer: Trainer, monitor: Callback, remedy: str) -> None:
    """Refuse a second monitor of a kind: both would log under the same names, and Lightning would log the means.

    Args:
        trainer: The Trainer.
        monitor: The monitor, one of its callbacks.
        remedy: How to use a single monitor instead, for the message.

    Raises:
        ValueError: If the Trainer has another one.
    """
    kind = [callback for callback in trainer.callbacks if type(callback) is type(monitor)]  # type: ignore[attr-defined]
    if len(kind) > 1 and monitor in kind:
        raise InvalidInputError(
            f"There are two callbacks {type(monitor).__name__}, which would log under the same names: {remedy}."
        )


def mark_of(module: LightningModule) -> object:
    """Return a unique object that a module keeps, which identifies data read for this module."""
    mark: object = vars(module).setdefault("_measured_as", object())
    return mark


def language_model_of(module: LightningModule, monitor: str) -> PreTrainedModel:
    """Return the causal language model in a module, for a monitor.

    Args:
        module: The module.
        monitor: Name of the monitor, for error messages.

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
    """Return the tokenizer of the named model or of the module, for a monitor.

    Args:
        module: The module, whose ``tokenizer`` is the default.
        name: Name of a model, or None.
        monitor: Name of the monitor, for the error message.

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
