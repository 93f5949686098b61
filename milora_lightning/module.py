"""The LightningModule around a Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, overload

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from milora_lightning.adapters.contexts import adapters_merged
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.checkpoint.adapter import inject_as_in
from milora_lightning.checkpoint.io import KEY
from milora_lightning.data.batches.images import IMAGES
from milora_lightning.data.encoding.asking import question_batch
from milora_lightning.data.encoding.prompt_format import PromptFormat, warn_of_another
from milora_lightning.models.choosing import choose_likeliest
from milora_lightning.models.choosing_attention import AUTO
from milora_lightning.models.generation import cut_at_stop, generate_greedily, greedy_config, use_generation_config
from milora_lightning.models.loss import causal_lm_loss, example_weights, supervised_logits
from milora_lightning.models.packed_rows import check_separation
from milora_lightning.models.positions import found_before_transfer, known_after_transfer, supervised_count
from milora_lightning.models.processor import DtypeName
from milora_lightning.models.quantized import Quantization
from milora_lightning.models.segments import positions_of
from milora_lightning.screen.figures import peak_memory
from milora_lightning.training.evaluation import Batch
from milora_lightning.training.loading import LoadedModule
from milora_lightning.training.schedules import WARMUP
from milora_lightning.training.throughput import Throughput
from milora_lightning.utils.errors import InvalidInputError

BY_EXAMPLE = "seq-mean-token-mean"


class CausalLMModule(LoadedModule):
    """Fine-tunes a causal language model on prompts and responses.

    Training logs the loss per supervised token, the learning rate, the gradient norm, throughput and memory; validation
    and test log loss and perplexity, generate answers and score them. Batches come from
    :class:`milora_lightning.SFTDataModule`.

    To change one part, subclass it and override :meth:`load_model`, :meth:`loss`, :meth:`answer`,
    :meth:`configure_metric` or Lightning's hooks, such as :meth:`configure_optimizers`.

    Args:
        name_or_path: A Hub name, a folder, a ``.gguf`` file, or ``"embedded"``.
        dtype: Dtype of the frozen weights: ``"auto"`` for that of the files, ``"fast"`` for bfloat16; with both, CPUs
            without products in the dtype keep the same values in float32. The Trainer's ``precision`` stays ``32-true``
            for a bfloat16 base, and must be ``16-mixed`` for a float16 one, whose gradients would vanish without loss
            scaling. Adapters and optimizer state are float32 either way.
        attn_implementation: An attention implementation of Hugging Face, ``"causal_blocks"`` (faster in training on
            CPUs), or None for Hugging Face's default. ``"auto"`` is causal_blocks on CPUs, flash attention on GPUs if
            it is installed and supports the model, and otherwise Hugging Face's default.
        gradient_checkpointing: Recompute activations in backward to save memory: of all decoder layers, or of a share
            of them from 0 to 1. All layers take a third to a half more time, a share of 0.25 a quarter of that.
        compile: Compile the decoder layers for training: it starts about a minute later, and every step is faster. On
            GPUs dropout is compiled, too, and draws different masks.
        optimizer: Creates the optimizer from the trainable parameters; by default the paper's AdamW.
        lr_scheduler: Name of a schedule of ``transformers.get_scheduler``. ``reduce_lr_on_plateau`` and ``greedy``
            follow ``val_loss`` after each validation.
        warmup_steps: Number of optimizer steps over which the learning rate rises linearly from zero, or, below 1, a
            fraction of the run.
        max_new_tokens: Length limit of generated answers.
        metric: Scores answers against references; by default the data's metric. Its result is logged as ``accuracy``,
            or, if it returns a dictionary, under the names in it.
        lr_scheduler_kwargs: Arguments of the schedule, such as ``min_lr_rate``, ``num_cycles`` or ``num_decay_steps``
            (numbers of steps may be fractions of the run, too).
        learning_rate: The peak learning rate, instead of the optimizer's ``lr``; a ``LearningRateFinder`` sets it. When
            training is resumed, this is the rate from there on.
        quantization: ``nf4``, ``fp4`` or ``int8`` to quantize the linear layers (except the language-model head) with
            bitsandbytes while the model is loaded. The adapters' factors are computed from the unquantized weights, and
            training starts exactly at the quantized model.
        liger: Train with Liger's kernels for norms, rotary embeddings and gated activations, on GPUs; needs the
            package liger-kernel.
        loss_agg_mode: How the losses of a training step are averaged: ``"token-mean"`` over all learned tokens, or
            ``"seq-mean-token-mean"`` first over the tokens of each example and then over examples, so that short
            answers count as much as long ones. Validation and test always report the mean over tokens.
        num_beams: Width of the beam search that generates answers; 1 for greedy decoding.
        loraplus_lr_ratio: Ratio of the learning rates of the adapters' factors B and A (LoRA+, arXiv 2402.12354), such
            as 16. Other learning rates then refer to A.

    Raises:
        FileNotFoundError: When the model is loaded, if there is no model with this name.
        ValueError: If the schedule or its arguments are unknown, or ``max_new_tokens`` is below 1; in ``setup`` or
            ``configure_optimizers`` if the schedule needs the length of the run and the run has no end; when the model
            is loaded, if it is to be both compiled and sharded by FSDP1, Liger has no kernels for it, or it would train
            in float16 with nothing scaling the loss; when training is resumed, if the checkpoint has no training state,
            or that of another optimizer.
    """

    takes_one_row = True
    """Whether this module keeps apart examples that share the only row of a batch."""

    def __init__(
        self,
        name_or_path: str,
        dtype: DtypeName = "auto",
        attn_implementation: str | None = AUTO,
        gradient_checkpointing: bool | float = False,
        compile: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4, weight_decay=0.0),
        lr_scheduler: str = "linear",
        warmup_steps: int | float = WARMUP,
        max_new_tokens: int = 256,
        metric: Metric | None = None,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        learning_rate: float | None = None,
        quantization: Quantization | None = None,
        liger: bool = False,
        loss_agg_mode: Literal["token-mean", "seq-mean-token-mean"] = "token-mean",
        num_beams: int = 1,
        loraplus_lr_ratio: float | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, warmup_steps, lr_scheduler_kwargs, learning_rate, metric)
        self.loraplus_lr_ratio = loraplus_lr_ratio
        if loss_agg_mode not in ("token-mean", BY_EXAMPLE):
            raise InvalidInputError(f"loss_agg_mode must be token-mean or {BY_EXAMPLE}, not {loss_agg_mode!r}.")
        if num_beams < 1:
            raise InvalidInputError(f"num_beams must be at least 1, not {num_beams}; 1 is greedy decoding.")
        if max_new_tokens < 1:
            raise InvalidInputError(
                f"max_new_tokens must be at least 1, not {max_new_tokens}. To generate no answers in validation, set "
                "the data's num_generation_examples to 0."
            )
        self.set_model_options(
            name_or_path, dtype, attn_implementation, gradient_checkpointing, compile, quantization, liger
        )
        self.save_hyperparameters(ignore=["optimizer", "metric"])
        self.max_new_tokens = max_new_tokens
        self.loss_agg_mode = loss_agg_mode
        self.num_beams = num_beams
        self.prompt_format: PromptFormat | None = None
        self._throughput = Throughput()

    def setup(self, stage: str) -> None:
        """Adopt the data's prompt format."""
        super().setup(stage)
        if self.sft_data is not None:
            trained, self.prompt_format = self.prompt_format, self.sft_data.prompt_format
            if stage != "fit" and trained is not None and self.prompt_format is not None:
                warn_of_another(trained, self.prompt_format)

    # ---- Training ----

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        # Only around the transfer: the other batch hooks are for users, and Lightning warns of modules that have them.
        if hook_name != "transfer_batch_to_device":
            return super()._call_batch_hook(hook_name, *args)
        batch, *others = args
        return known_after_transfer(super()._call_batch_hook(hook_name, found_before_transfer(batch), *others))

    def forward(self, batch: Batch) -> Tensor:
        """Compute the logits of the supervised tokens.

        Args:
            batch: ``input_ids`` and ``labels`` (batch, length), padded on the right. No attention mask is needed: with
                causal attention no token sees the padding after it. Packed rows also have ``position_ids``, and a
                single row of several examples ``cu_seq_lens`` and ``max_length``.

        Returns:
            Logits of shape (supervised tokens, vocabulary): those that predict a label other than the ignored one.
        """
        return supervised_logits(
            self._built(), batch["input_ids"], batch["labels"], positions_of(batch), **batch.get(IMAGES, {})
        )

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute a sum of losses in nats, and the number to divide it by.

        Returns:
            The sum of the next-token cross-entropies, and the number of tokens in that sum. In training with
            ``loss_agg_mode="seq-mean-token-mean"``, the sum of the examples' mean losses, and the number of examples.
        """
        labels = batch["labels"]
        weights: Tensor | None = None
        if self.training and self.loss_agg_mode == BY_EXAMPLE:
            weights, number = example_weights(labels, batch.get("position_ids"))
        else:
            number = supervised_count(labels)
        # The model runs even if no token is supervised: with a sharded model the other ranks wait for this one.
        images = batch.get(IMAGES, {})
        total = causal_lm_loss(self._built(), batch["input_ids"], labels, positions_of(batch), weights, **images)
        return total, number

    def start_loss(self, batch: Batch) -> Tensor:
        """Compute a batch's mean loss over its learned tokens, for starts that depend on data."""
        total, number = self.loss(batch)
        return total / number.clamp(min=1)

    def on_train_start(self) -> None:
        """Check that packed examples do not see each other in this model."""
        super().on_train_start()
        datamodule = self.sft_data
        remedy = None if datamodule is None else datamodule.remedy_for_shared_rows()
        if datamodule is not None and remedy is not None:
            examples = datamodule.examples("train")
            longest = max(range(len(examples)), key=examples["length"][:].__getitem__)
            check_separation(
                self._built(), examples[longest]["input_ids"][: max(2, datamodule.max_length // 2)], remedy
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the mean loss over the tokens (or examples, see ``loss_agg_mode``) of a batch on all ranks.

        With ``accumulate_grad_batches``, an optimizer step follows the gradient of the mean over those of all its
        batches, as one large batch would; that mean is logged as ``train_loss``.
        """
        total, tokens = self.loss(batch)
        loss = self.mean_over_ranks(total, tokens)
        self.log("train_loss", self.step_loss.mean, prog_bar=True)
        rate = self._throughput.add(batch["lengths" if "lengths" in batch else "attention_mask"].sum())
        if rate is not None:
            self.log("tokens_per_second", rate, prog_bar=True)
        if (peak := peak_memory(self.device)) is not None:
            self.log("peak_memory_gb", torch.full((), peak, device=self.device))
        return loss

    def on_validation_start(self) -> None:
        """Exclude the time of an evaluation from the throughput."""
        self._throughput.pause()

    # ---- Answering ----

    def answer(self, batch: Batch) -> list[str]:
        """Answer prompts: choose an answer if the batch has ``choices``, otherwise generate one."""
        return self.choose(batch) if "choices" in batch else self.generate(batch)

    @torch.no_grad()
    def choose(self, batch: Batch) -> list[str]:
        """Choose the likeliest of the given answers.

        Args:
            batch: ``choices``, a list for each example, and ``responses``, a batch for :meth:`forward` with one row for
                each choice.

        Returns:
            For each example the choice whose response has the largest log-likelihood, summed over its tokens.
        """
        responses = batch["responses"]
        return choose_likeliest(self(responses), responses["labels"], batch["choices"])

    @overload
    def generate(self, batch: str) -> str: ...

    @overload
    def generate(self, batch: Batch | list[str]) -> list[str]: ...

    @torch.no_grad()
    def generate(self, batch: Batch | str | list[str]) -> str | list[str]:
        """Generate answers greedily, or by beam search (``num_beams``), up to a stop token.

        Stop tokens are the model's ``generation_config.eos_token_id``, the tokenizer's EOS token, and the token that
        ended the responses in training, such as the end of turn of a chat template.

        Args:
            batch: A question or a list of questions, which are written in the prompt format of training; or a dict of
                ``input_ids`` and ``attention_mask`` (batch, length), padded on the left.

        Returns:
            The generated texts without prompts and special tokens; a single text if one question was given.

        Raises:
            ValueError: If questions are given and neither a prompt format nor a chat template is known.
        """
        tokenizer = self.tokenizer
        if not isinstance(batch, Mapping):
            asks = tokenizer if self.prompt_format is None else self.prompt_format.applied_to(tokenizer)
            answers = self.generate(question_batch([batch] if isinstance(batch, str) else batch, asks, self.device))
            return answers[0] if isinstance(batch, str) else answers
        end_of_turn = None if self.prompt_format is None else self.prompt_format.end_of_turn
        model = self._built()
        config = greedy_config(model, tokenizer, self.max_new_tokens, end_of_turn, self.num_beams)
        with adapters_merged(self), use_generation_config(model, config):
            tokens = generate_greedily(
                model, batch["input_ids"], batch["attention_mask"], config, **batch.get(IMAGES, {})
            )
        ids = cut_at_stop(tokens, config.eos_token_id or [])
        return cast(list[str], tokenizer.batch_decode(ids, skip_special_tokens=True))

    # ---- Checkpoints ----

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inject the checkpoint's adapters and take its prompt format, so that ``load_from_checkpoint`` works."""
        if self.prompt_format is None:
            self.prompt_format = PromptFormat.found_in(checkpoint)
        if KEY in checkpoint["state_dict"] and not lora_layers(self):
            inject_as_in(self, checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)
