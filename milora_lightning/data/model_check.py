"""A check that a model has an embedding and a position for every token of the data of a stage."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedModel

from milora_lightning.data.sources import Split
from milora_lightning.data.splits import TokenizedSplits
from milora_lightning.models.limits import check_positions, check_token_ids

# The Trainer's names of the splits, as in limit_val_batches.
TRAINER_NAMES = {"train": "train", "validation": "val", "test": "test"}


def check_model(data: TokenizedSplits, module: LightningModule, padded: int = 1) -> None:
    """Check a module's language model, if it has one, against the data loaded for the Trainer's stage.

    Args:
        data: The data.
        module: The module, attached to its Trainer.
        padded: Examples are padded to a multiple of this.

    Raises:
        ValueError: If tokens have no embedding or no position. A model that computes its positions gets a warning
            instead.
    """
    model, stage = language_model(module), module.trainer.state.fn
    if model is not None and stage is not None:
        check_fits(data, model, module.trainer, stage.value, getattr(module, "max_new_tokens", 1), padded)


def check_fits(
    data: TokenizedSplits, model: PreTrainedModel, trainer: Trainer, stage: str, max_new_tokens: int, padded: int = 1
) -> None:
    """Check a language model, which may be on the meta device, against the data that a stage reads.

    Args:
        data: The data.
        model: The model.
        trainer: The Trainer, which may leave splits out.
        stage: The Trainer's stage.
        max_new_tokens: How many tokens an answer may have.
        padded: Examples are padded to a multiple of this.

    Raises:
        ValueError: As for :func:`check_model`.
    """
    splits = [split for split in data.loaded(stage) if _runs(trainer, split, stage)]
    examples = {split: data.examples(split) for split in splits}
    check_token_ids(
        model,
        data.tokenizer_object,
        lambda: {name: max(map(max, part["input_ids"][:])) for name, part in examples.items()},
    )
    predicts = stage == "predict"
    lengths: dict[str, int] = {} if predicts else {name: data.longest(name) for name in splits}
    prompts: dict[str, int] = {}
    for split, part in examples.items():
        answered = range(len(part)) if predicts else data.answered(split)
        if answered and data.answer_by == "generation":
            tokens = data.prompts(split)["prompt_length"][:]
            prompts[split] = max(tokens[i] for i in answered)
    check_positions(model, lengths, prompts, max_new_tokens, padded)


def language_model(module: LightningModule) -> PreTrainedModel | None:
    """Return the only transformers model in a module; None if there are none or several, which may read other data."""
    models = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    inside = {child for model in models for child in model.modules() if child is not model}
    outermost = [model for model in models if model not in inside]
    return outermost[0] if len(outermost) == 1 else None


def _runs(trainer: Trainer, split: Split, stage: str) -> bool:
    name = "predict" if stage == "predict" else TRAINER_NAMES[split]
    return bool(getattr(trainer, f"limit_{name}_batches"))
