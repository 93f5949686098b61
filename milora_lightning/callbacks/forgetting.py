"""Measures how much a language model forgets while it is fine-tuned."""

from __future__ import annotations

from statistics import mean

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from milora_lightning.adapters.contexts import adapters_disabled
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.callbacks._monitoring import check_alone, language_model_of, mark_of, tokenizer_of
from milora_lightning.data.held_out import pack, read_texts
from milora_lightning.metrics.forgetting import Forgetting
from milora_lightning.parallel.work import in_step
from milora_lightning.strategies.base import data_rank, refuse_flat_shards, shards
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.modes import eval_mode


class ForgettingMonitor(Callback):
    """Measures at every validation how far the predictions on held-out text have moved from the base model's.

    The base model is the same model with its adapters disabled, so no second model is in memory. Other weights that
    train (``modules_to_save``, or all weights in full fine-tuning) are copied before training. Logs ``forgetting_kl``,
    the KL divergence from the base model's next-token distribution, and ``forgetting_cross_entropy``, the MiLoRA
    paper's measure (arXiv 2406.09044, section 5.4), in nats per token over all ranks. The values before training, where
    the KL divergence is 0, are logged as step 0.

    If texts have names, both are also logged for each (``forgetting_kl/NAME``); the values without a name are then
    means with equal weight for each text.

    Attributes:
        examples: Values for each sequence in the latest measurement of this rank, by name of the metric.
        weights: The weight of each sequence, by the same names.

    Args:
        text: Held-out text: a ``.txt`` file, a JSON, JSON lines or Parquet file, or a Hub name; or a dictionary of
            several by name.
        field: Field that contains the text; not used for ``.txt`` files.
        split: The split of a Hub data set.
        max_tokens: Maximum number of tokens of each text to measure on; each measurement takes two forward passes over
            them.
        block_length: Number of tokens in a sequence.
        batch_size: Number of sequences in a batch, on each rank.
        tokenizer: Name of the model whose tokenizer is used; by default the module's ``tokenizer``.

    Raises:
        FileNotFoundError: In ``setup``, if the text does not exist.
        ValueError: In ``setup`` if the text cannot be used, if there is another ForgettingMonitor, or under FSDP1; when
            fitting starts if the module has no causal language model of Hugging Face; at the first measurement if
            weights that must be copied are sharded or have already been trained.
    """

    def __init__(
        self,
        text: str | dict[str, str],
        field: str = "text",
        split: str = "test",
        max_tokens: int = 16384,
        block_length: int = 256,
        batch_size: int = 4,
        tokenizer: str | None = None,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("block_length", block_length), ("batch_size", batch_size)):
            if value < 2 - (name == "batch_size"):
                raise InvalidInputError(f"{name}={value} leaves nothing to measure on: raise it.")
        self.text = text
        self.field = field
        self.split = split
        self.max_tokens = max_tokens
        self.block_length = block_length
        self.batch_size = batch_size
        self.tokenizer = tokenizer
        self.examples: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self._texts: dict[str, list[str]] = {}
        self._blocks: dict[str, Tensor] = {}
        self._before: dict[str, float] | None = None
        self._base: dict[str, Tensor] | None = None
        self._of: object = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the text before the model is loaded, so that a wrong path is found early."""
        refuse_flat_shards(trainer.strategy, "ForgettingMonitor cannot call the language model")
        check_alone(trainer, self, "give one of them several texts by names, text={one: FILE, two: FILE}")
        if not self._texts:
            places = self.text if isinstance(self.text, dict) else {"": self.text}
            self._texts = {name: read_texts(place, self.field, self.split) for name, place in places.items()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a language model."""
        language_model_of(pl_module, "ForgettingMonitor")
        self._before = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        results = self.measure(trainer, pl_module)
        pl_module.log_dict(results)
        if trainer.sanity_checking:
            self._before = results

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values from before training, because Lightning does not log its sanity check."""
        if trainer.global_step == 0:
            before = self._before or self.measure(trainer, pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(before, step=0)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Compute ``forgetting_kl`` and ``forgetting_cross_entropy``, in nats per token over all ranks.

        Args:
            trainer: The Trainer; all ranks must call this.
            pl_module: The module with the model.
        """
        model = language_model_of(pl_module, "ForgettingMonitor")
        if self._of is not (mark := mark_of(pl_module)):  # a monitor may measure several models, one after the other
            self._of, self._blocks, self._base = mark, {}, None
        base = self._base_weights(trainer, model)
        results: dict[str, dict[str, float]] = {}
        each: dict[str, Tensor] = {}
        for name, blocks in self._tokens(pl_module).items():
            metric = Forgetting().to(pl_module.device)
            each[name] = self._add(metric, blocks, trainer, model, base)
            results[name] = {key: value.item() for key, value in metric.compute().items()}
        self.examples = {"forgetting_kl": torch.cat([*each.values()]).cpu()}
        self.weights = {
            "forgetting_kl": torch.cat([torch.full((len(of),), 1 / max(1, len(of))) for of in each.values()])
        }
        if "" not in results:
            results[""] = {key: mean(of[key] for of in results.values()) for key in ("kl", "cross_entropy")}
        return {
            f"forgetting_{key}" + (f"/{name}" if name else ""): value
            for name, of in results.items()
            for key, value in of.items()
        }

    def _add(
        self,
        metric: Forgetting,
        blocks: Tensor,
        trainer: Trainer,
        model: PreTrainedModel,
        base: dict[str, Tensor],
    ) -> Tensor:
        """Add blocks of tokens to the metric, and return the mean KL divergence of each block on this rank."""
        batches = torch.split(blocks, self.batch_size)
        each = [torch.empty(0, device=metric.device)]
        with torch.no_grad(), eval_mode(model), trainer.precision_plugin.forward_context():
            share = data_rank(trainer)
            for batch, counts in in_step(batches, share.number, share.size):
                ids = batch.to(metric.device)
                logits = model(input_ids=ids, use_cache=False).logits
                with adapters_disabled(model):
                    base_logits = functional_call(model, base, kwargs={"input_ids": ids, "use_cache": False}).logits
                if counts:
                    metric.update(logits, base_logits)
                    each.append(metric.latest.mean(-1))
        return torch.cat(each)

    def _base_weights(self, trainer: Trainer, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return copies, made before training, of the weights that train besides the adapters."""
        if self._base is None:
            factors = {p for layer in lora_layers(model).values() for p in layer.parameters()}
            others = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in factors}
            if others and shards(trainer.strategy):  # a forward pass would replace the copies by gathered weights
                raise InvalidInputError(
                    f"{next(iter(others))!r} trains besides the adapters, and ForgettingMonitor cannot restore sharded "
                    "weights to measure the base model: use one device, or strategy: ddp."
                )
            if others and (trainer.state.fn != TrainerFn.FITTING or trainer.global_step > 0):
                raise InvalidInputError(
                    f"{next(iter(others))!r} trains besides the adapters, and its value before training is not known "
                    "here. ForgettingMonitor can measure such a run only from its beginning: start there, or leave it "
                    "out."
                )
            self._base = {name: p.detach().clone() for name, p in others.items()}
        return self._base

    def _tokens(self, pl_module: LightningModule) -> dict[str, Tensor]:
        if not self._blocks:
            tokenizer = tokenizer_of(pl_module, self.tokenizer, "ForgettingMonitor")
            self._blocks = {
                name: pack(texts, tokenizer, self.block_length, self.max_tokens) for name, texts in self._texts.items()
            }
        return self._blocks
