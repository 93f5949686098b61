"""The LightningModule around a Hugging Face causal language model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from transformers import PreTrainedModel

from milora_lightning.adapters.injection import adapters_merged, inject, lora_layers
from milora_lightning.callbacks.milora_init import MiLoRAInit
from milora_lightning.checkpoint.adapter import inject_as_in
from milora_lightning.checkpoint.io import KEY
from milora_lightning.config import IGNORE_INDEX
from milora_lightning.data import SFTDataModule
from milora_lightning.data.batches.batching import TEXTS
from milora_lightning.data.encoding.asking import question_batch
from milora_lightning.data.encoding.prompt_format import PromptFormat, warn_of_another
from milora_lightning.data.model_check import check_model
from milora_lightning.metrics import AnswerAccuracy, TaskAccuracy
from milora_lightning.models.compile import compile_layers
from milora_lightning.models.generation import generate_greedily, greedy_config, nothing_else, without_stop
from milora_lightning.models.loss import causal_lm_loss, supervised_logits
from milora_lightning.models.packed_rows import check_separation, check_takes_positions
from milora_lightning.models.pretrained import load_causal_lm, load_tokenizer
from milora_lightning.models.processor import warn_of_slow_products
from milora_lightning.models.quantized import Quantization
from milora_lightning.models.streaming import empty_causal_lm, shard, stream_weights
from milora_lightning.screen.figures import peak_memory
from milora_lightning.strategies.base import shards
from milora_lightning.training.optimization import OptimizedModule
from milora_lightning.training.schedules import WARMUP
from milora_lightning.utils.errors import InvalidInputError

Batch = dict[str, Any]
Answers = dict[str, list[dict[str, str]]]


class CausalLMModule(OptimizedModule):
    """Fine-tunes a causal language model on prompts and responses.

    Logs the loss and perplexity per supervised token, the learning rate, the gradient's norm, throughput and memory;
    validation and test also generate answers and score them. Batches come from
    :class:`milora_lightning.SFTDataModule`.

    Args:
        name_or_path: A Hub name, a folder, a ``.gguf`` file, or ``"embedded"``.
        dtype: Dtype of the frozen weights, or ``"auto"`` for that of the files. The Trainer's ``precision`` stays
            ``32-true`` for a half-precision base: adapters and optimizer state are float32 either way.
        attn_implementation: Hugging Face's name of an attention implementation, or ``"causal_blocks"``, which is
            faster than those in training on CPUs; by default Hugging Face's choice.
        gradient_checkpointing: Recompute activations in backward to save memory.
        compile: Compile the decoder layers for training, which takes a minute at its start and makes every step faster.
        optimizer: Makes the optimizer from the trainable parameters; the paper's AdamW by default.
        lr_scheduler: Name of a schedule of ``transformers.get_scheduler``. ``reduce_lr_on_plateau`` and ``greedy`` look
            at ``val_loss`` after each validation.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from zero, or, below 1, the share of
            the run that they are.
        max_new_tokens: Length limit of generated answers.
        metric: Scores answers against references; by default the data's own. What it computes is logged as
            ``accuracy``, or under the names that it returns.
        lr_scheduler_kwargs: Arguments of the schedule, such as ``min_lr_rate``, ``num_cycles`` or ``num_decay_steps``
            (numbers of steps may be shares, too).
        learning_rate: The highest learning rate, in place of the optimizer's ``lr``; what a ``LearningRateFinder``
            finds is set here. In a resumed run it is the rate from there on.
        quantization: ``nf4``, ``fp4`` or ``int8``: have bitsandbytes quantize the linear layers as the model is loaded
            (all but the language-model head). Adapters start from the unquantized weights, the model from what the
            quantized one computes.

    Raises:
        FileNotFoundError: When the model is built, if there is none of that name.
        ValueError: If there is no such schedule, or not with these arguments, or ``max_new_tokens`` is below 1; in
            ``setup`` or ``configure_optimizers`` if the schedule needs to know the length of a run that has none; when
            the model is built, if it is to be both compiled and sharded; when training is resumed, if the checkpoint
            has no state of it, or that of another optimizer.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4, weight_decay=0.0),
        lr_scheduler: str = "linear",
        warmup_steps: int | float = WARMUP,
        max_new_tokens: int = 256,
        metric: Metric | None = None,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        learning_rate: float | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, warmup_steps, lr_scheduler_kwargs, learning_rate)
        if max_new_tokens < 1:
            raise InvalidInputError(
                f"max_new_tokens must be at least 1, not {max_new_tokens}. To generate no answers in validation, set "
                "the data's num_generation_examples to 0."
            )
        self.save_hyperparameters(ignore=["optimizer", "metric"])
        self.name_or_path = name_or_path
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.quantization = quantization
        self.max_new_tokens = max_new_tokens
        self.metric = metric
        self._follows_data = metric is None
        self.eval_loss = MeanMetric()
        self.model: PreTrainedModel | None = None
        self.prompt_format: PromptFormat | None = None
        self._generated = False
        self._clock: tuple[float, Tensor] | None = None

    def setup(self, stage: str) -> None:
        """Ask as the data does, and take its metric unless one is given."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, SFTDataModule):
            trained, self.prompt_format = self.prompt_format, datamodule.prompt_format
            if stage != "fit" and trained is not None and self.prompt_format is not None:
                warn_of_another(trained, self.prompt_format)
        if self._follows_data:
            self.metric = datamodule.metric() if isinstance(datamodule, SFTDataModule) else AnswerAccuracy()

    def configure_model(self) -> None:
        """Load the model, once, and check that it has what the data asks of it."""
        if self.model is None:
            self._load()
        datamodule = getattr(self._trainer, "datamodule", None)
        if isinstance(datamodule, SFTDataModule):
            check_model(datamodule, self, datamodule.pad_to_multiple_of)
            if datamodule.packing:
                check_takes_positions(self._built())

    def _load(self) -> None:
        self._check_quantized()
        if self.compile_layers and self.device_mesh is not None:
            raise InvalidInputError(
                "compile=True does not work with sharded models yet: leave it out, or use strategy: ddp."
            )
        origin = self.name_or_path, self.dtype_name, self.attn_implementation
        if self.device_mesh is None:
            model = load_causal_lm(*origin, self.quantization, self._device_to_quantize_on())
        else:
            model = empty_causal_lm(*origin)
        if self.gradient_checkpointing:
            # Non-reentrant checkpoints reach adapters though nothing before them requires a gradient.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile_layers:
            compile_layers(model)
        if self._trainer is not None and self._trainer.strategy.root_device.type == "cpu":
            warn_of_slow_products(model.dtype)
        self.model = model.train()
        if self.device_mesh is not None:  # FSDP2: adapters go in before the model is sharded, weights after that
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, MiLoRAInit) and callback.config is not None:
                    inject(self, callback.config)
            shard(model, self.device_mesh["data_parallel"])
            stream_weights(model, self.name_or_path, self.trainer.strategy.root_device)
        self.tokenizer = load_tokenizer(self.name_or_path)

    def _device_to_quantize_on(self) -> torch.device:
        trainer = self._trainer
        return torch.device("cpu") if trainer is None else trainer.strategy.root_device

    def _check_quantized(self) -> None:
        """Refuse what cannot be done with codes, before a model is loaded."""
        if self.quantization is None or self._trainer is None:
            return
        if shards(self._trainer.strategy):
            raise InvalidInputError(
                f"quantization: {self.quantization} does not work with sharded models, whose weights are read shard by "
                "shard: leave it out, or use one device or strategy: ddp."
            )
        adapters = [c for c in self._trainer.callbacks if isinstance(c, MiLoRAInit) and c.config is not None]  # type: ignore[attr-defined]
        if self._trainer.state.fn == TrainerFn.FITTING and not adapters:
            raise InvalidInputError(
                f"Weights with quantization: {self.quantization} cannot be trained themselves: train adapters "
                "(adapter.init: milora), or leave quantization out."
            )

    def forward(self, batch: Batch) -> Tensor:
        """Compute the logits of the supervised tokens.

        Args:
            batch: ``input_ids`` and ``labels`` (batch, length), padded on the right. Causal attention keeps the
                padding out of every token before it, so no attention mask is needed. Packed rows have
                ``position_ids``, too.

        Returns:
            Logits of shape (supervised tokens, vocabulary): at each position whose next label counts.
        """
        return supervised_logits(self._built(), batch["input_ids"], batch["labels"], batch.get("position_ids"))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the sum of the next-token cross-entropies in nats, and over how many tokens it is taken."""
        labels = batch["labels"]
        # The model runs even without a supervised token: under sharding the other ranks wait for this one.
        total = causal_lm_loss(self._built(), batch["input_ids"], labels, batch.get("position_ids"))
        return total, (labels[:, 1:] != IGNORE_INDEX).sum()

    def on_train_start(self) -> None:
        """Try whether the model keeps packed examples apart."""
        super().on_train_start()
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, SFTDataModule) and datamodule.packing:
            examples = datamodule.examples("train")
            longest = max(range(len(examples)), key=examples["length"][:].__getitem__)
            check_separation(self._built(), examples[longest]["input_ids"][: max(2, datamodule.max_length // 2)])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the mean loss over the tokens of a batch, those of all ranks together.

        With ``accumulate_grad_batches``, an optimizer step takes the gradient of the mean over the tokens of all its
        batches, as one large batch would.
        """
        total, tokens = self.loss(batch)
        loss = self.mean_over_ranks(total, tokens)
        self.log("train_loss", loss, prog_bar=True)
        self._log_throughput(batch["lengths" if "lengths" in batch else "attention_mask"].sum())
        if (peak := peak_memory(self.device)) is not None:
            self.log("peak_memory_gb", torch.full((), peak, device=self.device))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Answers | None:
        """Add a batch to the loss, or its generated answers to the metric.

        Returns:
            Of what was answered, the records of :meth:`predict_step`, as ``answers``.
        """
        return self._evaluation_step(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Answers | None:
        """Do so for the test."""
        return self._evaluation_step(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Answer.

        Returns:
            One record for each example with the keys ``prompt``, ``instruction``, ``generation``, ``reference`` and
            ``task``.
        """
        return _records(batch, self.answer(batch))

    def on_validation_epoch_start(self) -> None:
        """Begin with empty metrics."""
        self._reset_evaluation()

    def on_test_epoch_start(self) -> None:
        """Begin with empty metrics."""
        self._reset_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Log the results of validation."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the results of the test."""
        self._log_evaluation("test")

    def answer(self, batch: Batch) -> list[str]:
        """Answer prompts: by generating, or by choosing where a batch brings choices."""
        return self.choose(batch) if "choices" in batch else self.generate(batch)

    @torch.no_grad()
    def choose(self, batch: Batch) -> list[str]:
        """Choose the likeliest of given answers.

        Args:
            batch: ``choices``, a list for each example, and ``responses``, a batch as for :meth:`forward` with one
                row for each of them.

        Returns:
            For each example the choice whose response has the largest log-likelihood, summed over its tokens.
        """
        labels = batch["responses"]["labels"][:, 1:]
        supervised = labels != IGNORE_INDEX
        losses = F.cross_entropy(self(batch["responses"]).float(), labels[supervised], reduction="none")
        rows = supervised.nonzero()[:, 0]
        scores = -torch.zeros(len(labels), device=losses.device).index_add_(0, rows, losses)
        parts = torch.split(scores, [len(choices) for choices in batch["choices"]])
        return [choices[int(part.argmax())] for choices, part in zip(batch["choices"], parts, strict=True)]

    @overload
    def generate(self, batch: str) -> str: ...

    @overload
    def generate(self, batch: Batch | list[str]) -> list[str]: ...

    @torch.no_grad()
    def generate(self, batch: Batch | str | list[str]) -> str | list[str]:
        """Generate answers greedily, each up to a token that ends it.

        That is any of the model's own ``generation_config.eos_token_id``, the tokenizer's EOS token, or what ended the
        responses in training, such as a chat template's end of turn.

        Args:
            batch: Questions, which are asked as in training, or one; or a dict of ``input_ids`` and
                ``attention_mask`` (batch, length), padded on the left.

        Returns:
            The generated texts, without prompts and special tokens; a text for a text.

        Raises:
            ValueError: If questions are given, and it is not known how to ask them.
        """
        tokenizer = self.tokenizer
        if not isinstance(batch, Mapping):
            asks = tokenizer if self.prompt_format is None else self.prompt_format.applied_to(tokenizer)
            answers = self.generate(question_batch([batch] if isinstance(batch, str) else batch, asks, self.device))
            return answers[0] if isinstance(batch, str) else answers
        end_of_turn = None if self.prompt_format is None else self.prompt_format.end_of_turn
        model = self._built()
        config = greedy_config(model, tokenizer, self.max_new_tokens, end_of_turn)
        with adapters_merged(self), nothing_else(model, config):
            tokens = generate_greedily(model, batch["input_ids"], batch["attention_mask"], config)
        ids = without_stop(tokens, config.eos_token_id or [])
        return cast(list[str], tokenizer.batch_decode(ids, skip_special_tokens=True))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the adapters that a checkpoint brings, and ask as it was asked: all ``load_from_checkpoint`` needs."""
        if self.prompt_format is None:
            self.prompt_format = PromptFormat.found_in(checkpoint)
        if KEY in checkpoint["state_dict"] and not lora_layers(self):
            inject_as_in(self, checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)

    def _built(self) -> PreTrainedModel:
        if self.model is None:
            raise RuntimeError("The model is not loaded yet: call configure_model() before using the module alone.")
        return self.model

    def _evaluation_step(self, batch: Batch) -> Answers | None:
        if "reference" not in batch:
            total, tokens = self.loss(batch)
            self.eval_loss.update(total / tokens.clamp(min=1), tokens)
            return None
        self._generated = True
        records = _records(batch, self.answer(batch))
        keys = ["generation", "reference", *(["task"] if isinstance(self.metric, TaskAccuracy) else [])]
        if records and self.metric is not None:
            self.metric.update(*([record[key] for record in records] for key in keys))
        return {"answers": records}

    def _reset_evaluation(self) -> None:
        # At the start and not at the end, because states made in the inference mode of a validation by itself could
        # not be added to in one within a fit.
        self.eval_loss.reset()
        if self.metric is not None:
            self.metric.reset()
        self._generated = False

    def _log_evaluation(self, stage: str) -> None:
        loss = self.eval_loss.compute()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.follow(loss)
        self.log_dict({f"{stage}_loss": loss, f"{stage}_perplexity": loss.exp()}, prog_bar=True)
        if self._generated and self.metric is not None:  # the same on all ranks, also on one without examples
            result = self.metric.compute()
            results = result if isinstance(result, dict) else {"accuracy": result}
            self.log_dict({f"{stage}_{name}": value for name, value in results.items()}, prog_bar=True)

    def _log_throughput(self, tokens: Tensor) -> None:
        """Log the tokens per second between the ends of two consecutive batches, padding not counted."""
        now = time.perf_counter()
        if self._clock is not None:
            self.log("tokens_per_second", self._clock[1] / (now - self._clock[0]), prog_bar=True)
        self._clock = now, tokens

    def on_validation_start(self) -> None:
        """Keep the time of an evaluation out of the throughput."""
        self._clock = None


def _records(batch: Batch, answers: list[str]) -> list[dict[str, str]]:
    """Put answers beside the texts of their batch, and leave out examples that only fill it up."""
    columns = {"generation": answers, **{text: batch[text] for text in TEXTS}}
    records = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [record for record in records if record["reference"] is not None]
