"""The LightningDataModule for supervised fine-tuning."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from milora_lightning.data.batches.resuming import Resumption
from milora_lightning.data.encoding.prompt_format import KEY, PromptFormat, warn_of_another
from milora_lightning.data.encoding.templates import AUTO
from milora_lightning.data.encoding.turn_encoding import ASSISTANT
from milora_lightning.data.sources import ChecksTest, MultipleChoice, Source, Split
from milora_lightning.data.splits import SPLITS
from milora_lightning.data.streaming.encoding import check_trainer
from milora_lightning.data.streaming.places import StreamPlaces
from milora_lightning.data.training_loading import TrainingLoaders
from milora_lightning.utils.errors import InvalidInputError

TRAIN_ON = "train_on"
"""Entry of the state, and of a checkpoint, that records which turns were learned."""

TRAIN_ON_INPUTS = "train_on_inputs"
"""The same for whether prompts were learned."""

# The split that each stage needs.
NEEDED: dict[str | None, Split] = {"fit": "train", "validate": "validation", "test": "test", "predict": "test"}


class SFTDataModule(TrainingLoaders):
    r"""Data module for supervised fine-tuning of a causal language model.

    Training and loss batches are dicts of ``input_ids``, ``attention_mask`` and ``labels``, each int64 of shape
    (batch, length). Only the tokens of the response have labels, including the token that ends it: EOS, or the end of
    turn with the template ``"chat"``. Validation and test have a second loader of prompts to answer, whose batches have
    ``input_ids`` and ``attention_mask``, padded on the left, and lists of texts (see
    :class:`milora_lightning.data.PromptCollator`). With several ranks, each gets its share, and evaluation counts every
    example once.

    Args:
        source: Where examples come from.
        tokenizer: The model's name (see :func:`milora_lightning.models.pretrained.load_tokenizer`), or its tokenizer.
        template: How prompts and conversations are formatted: ``"alpaca"``, ``"chat"`` for the tokenizer's chat
            template, ``"plain"`` for the bare prompt and a line break, ``"vicuna"`` for the chat template of LLaVA-1.5,
            or the path of a Jinja file with a chat template; ``"auto"`` is ``"chat"`` if there are conversations, and
            ``"alpaca"`` if not. ``"metamath"``, ``"llm-adapters"`` and ``"tulu"`` format and tokenize like the code
            bases with these names.
        prompt_suffix: Text added unchanged after every prompt and its template, for example
            ``"Let's think step by step.\n"``. With ``"chat"``, it is the beginning of the assistant's answer.
        generation_prompt_suffix: A different suffix for prompts to answer, with which the model was not trained; None
            for ``prompt_suffix``.
        max_length: Maximum number of tokens in an example. A prompt that is too long loses its beginning (in chats, the
            beginning of the user's text), a response that is too long its end.
        batch_size: Training examples per device and batch. None for 16, or fewer with a smaller ``global_batch_size``.
        eval_batch_size: Examples per rank and batch in validation and test; None for ``batch_size``.
        generation_batch_size: Prompts per rank and batch to generate from; None for ``eval_batch_size``.
        num_generation_examples: Number of validation examples, counted from the first, to generate answers for; 0 for
            none, None for all.
        num_test_generation_examples: The same for each test set. Prediction answers all of test.
        answer_by: ``"generation"``; or, for a multiple-choice source, ``"likelihood"`` to choose the response with the
            largest log-likelihood, summed over its tokens.
        pad_to_multiple_of: Batch lengths are rounded up to a multiple of this.
        num_proc: Number of processes that tokenize; None or 0 for only the main one (whose tokenizer uses threads).
        num_workers: Number of processes that load batches.
        seed: Seed of the training order.
        train_on: Which turns of conversations are learned: ``"assistant"`` for all turns of the assistant, ``"last"``
            for its last turn, or a list of roles. A field ``weight``, ``loss`` or ``train`` (0 or 1, false or true) in
            a message decides for that message. In a ``text`` every token is learned.
        train_on_inputs: Whether to learn the prompts as well, in data with prompts and responses. Evaluations then
            report the loss over all tokens, too.
        group_by_length: Whether the examples of a training batch have similar lengths, to reduce padding. If not, the
            order is uniformly random.
        packing: Put several training examples into each row of up to ``max_length`` tokens, so that there is almost no
            padding; ``batch_size`` then counts rows. The model keeps the examples apart by ``position_ids``, which
            replace the attention mask in these batches. The same examples share a row in each epoch.
        padding_free: Put the examples of each training batch into one row, without padding between them. ``"auto"``
            does so if the model's attention then skips pairs of tokens from different examples (flash and flex
            attention). With other implementations it is also correct, but rarely faster than padding.
        max_tokens_per_batch: Tokens per rank and training batch, padding included, instead of ``batch_size`` examples.
            A batch gets examples of similar length or, with ``padding_free``, any that fill it.
        streaming: Read and tokenize the training data during training, so that they may be larger than memory and
            disk. Needs the Trainer's ``max_steps``, since the length of a stream is not known; a stream that ends is
            read again. Validation data are the first ``validation_size`` rows, or separate data.
        shuffle_buffer: With ``streaming``, the number of records in memory at a time, which are shuffled, grouped by
            length and packed together.
        global_batch_size: Training examples in an optimizer step, whatever the number of devices. These share the
            examples, and accumulate gradients if ``batch_size`` is smaller than their share. ``val_check_interval`` and
            ``limit_train_batches`` then count steps. None for one batch per device, times the Trainer's
            ``accumulate_grad_batches``.

    Raises:
        ValueError: If a size is out of range, or ``answer_by="likelihood"`` is used with a source without choices; in
            ``setup``, if a needed split is missing.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: str | PreTrainedTokenizerBase = "",
        template: str = AUTO,
        prompt_suffix: str = "",
        max_length: int = 1024,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        generation_batch_size: int | None = None,
        num_generation_examples: int | None = 64,
        num_test_generation_examples: int | None = None,
        answer_by: Literal["generation", "likelihood"] = "generation",
        pad_to_multiple_of: int = 8,
        num_proc: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        train_on: str | list[str] = ASSISTANT,
        packing: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        padding_free: bool | Literal["auto"] = "auto",
        max_tokens_per_batch: int | None = None,
        generation_prompt_suffix: str | None = None,
        train_on_inputs: bool = False,
        group_by_length: bool = True,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            source,
            tokenizer,
            template,
            prompt_suffix,
            generation_prompt_suffix,
            max_length,
            num_proc,
            train_on,
            train_on_inputs,
            streaming,
            num_generation_examples,
            num_test_generation_examples,
            answer_by,
        )
        self.set_sizes(batch_size, global_batch_size, max_tokens_per_batch)
        self.eval_batch_size = self.batch_size if eval_batch_size is None else eval_batch_size
        self.generation_batch_size = self.eval_batch_size if generation_batch_size is None else generation_batch_size
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_workers = num_workers
        self.seed = seed
        self.packing = packing
        self.padding_free = padding_free
        self.shuffle_buffer = shuffle_buffer
        self.group_by_length = group_by_length
        self._resumption = Resumption(self)
        order = {"num_workers": max(1, num_workers), "shuffle_buffer": shuffle_buffer, "packing": packing, "seed": seed}
        order["group_by_length"] = group_by_length
        self._places = StreamPlaces(self, order)
        sizes = ["batch_size", "eval_batch_size", "generation_batch_size", "pad_to_multiple_of", "shuffle_buffer"]
        sizes += ["max_tokens_per_batch", "global_batch_size"]
        counts = ("num_generation_examples", "num_test_generation_examples")
        for name, least in [*((size, 1) for size in sizes), *((count, 0) for count in counts)]:
            if (value := getattr(self, name)) is not None and value < least:
                raise InvalidInputError(f"{name} must be at least {least}, not {value}.")
        if self.shows_images and (packing or streaming):
            raise InvalidInputError(
                f"{type(source).__name__} has images, which work with neither packing nor streaming: leave both out."
            )
        if self.shows_images and (padding_free is True or max_tokens_per_batch is not None):
            raise InvalidInputError(
                f"{type(source).__name__} has images, whose batches are padded and of batch_size examples: leave "
                "padding_free and max_tokens_per_batch out."
            )
        if not group_by_length and max_tokens_per_batch is not None:
            raise InvalidInputError(
                "max_tokens_per_batch fills batches by length, so their order is not uniformly random: leave it "
                "or group_by_length: false out."
            )
        if streaming and max_tokens_per_batch is not None:
            raise InvalidInputError(
                "max_tokens_per_batch groups all of the data by length, and a stream is not read whole: leave it out, "
                "and set packing: true and max_length for rows of so many tokens."
            )
        if answer_by == "likelihood" and not isinstance(source, MultipleChoice):
            raise InvalidInputError(
                f"answer_by='likelihood' needs a source with choices, which {type(source).__name__} is not. Use "
                "'generation', or give the source a method choices(prompt)."
            )
        if answer_by == "likelihood" and self.shows_images:
            raise InvalidInputError(
                "answer_by='likelihood' compares texts, and the model would choose without seeing the images: use "
                "'generation'."
            )

    def prepare_data(self) -> None:
        """Fill the caches in one process per machine, before the other processes read them."""
        if self.trainer is not None and self.trainer.world_size > 1 and not self.streaming:
            stage = self.trainer.state.fn and self.trainer.state.fn.value
            for split in SPLITS[stage]:
                self._tokenized(split, stage == "predict")
                if split != "train" and self._asks_otherwise:
                    self._tokenized(split, stage == "predict", asks=True)

    def setup(self, stage: str | None = None) -> None:
        """Load and tokenize the splits that a stage needs, unless that has been done.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; None for all splits.

        Raises:
            ValueError: If the source lacks a needed split, its data cannot be used, or a stream lacks ``max_steps``.
        """
        if stage == "test" and isinstance(self.source, ChecksTest):
            self.source.check_test()
        if stage == "fit" and self.trainer is not None:
            if self.streaming:
                check_trainer(self.trainer)
            self.accumulate()
        for split in SPLITS[stage]:
            predicts = stage == "predict"  # predict also answers prompts without a response; an evaluation drops these
            if split not in self._splits or (split == "test" and self._unanswered not in (None, predicts)):
                self._splits[split] = self._tokenized(split, predicts)
                self._prompts.pop(split, None)
        if stage is not None:
            self.examples(NEEDED[stage])
        if stage == "fit":
            if self.template == AUTO and self.trainer is not None:
                self.say(f"Template: {self.template_in_words}.")
            self._resumption.forget()
            self._places.forget()

    def teardown(self, stage: str) -> None:
        """Restore the Trainer's options for its next run."""
        self._resumption.count_from_start()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints: the position in the data, their description and the prompt format."""
        # Lightning's handling of stateful loaders would skip a loader that was created before the loops are restored,
        # as happens when the length of the learning-rate schedule is computed.
        position, prompt_format = self._resumption.state_dict(), self.prompt_format
        record = None if prompt_format is None else prompt_format.record()
        stream = self._places.state_dict() if self.streaming else None
        asked = {KEY: record, TRAIN_ON: self.train_on, TRAIN_ON_INPUTS: self.train_on_inputs, **self.state_of_steps()}
        return {"position": position, "stream": stream, "description": self.description, **asked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position in the training data, also on another number of ranks.

        Warns if the checkpoint was trained with another prompt format.
        """
        trained, now = PromptFormat.found_in({"data": state_dict}), self.prompt_format
        if trained is not None and now is not None:
            warn_of_another(trained, now)
        stream = state_dict.get("stream")
        if self.trainer is not None and self.trainer.state.fn == "fit" and self.streaming != (stream is not None):
            raise InvalidInputError(
                f"The checkpoint was written {'with' if stream else 'without'} data.streaming, and can only be resumed "
                f"{'with' if stream else 'without'} it: set data.streaming: {'true' if stream else 'false'}, or start "
                "again."
            )
        if stream is not None and self.streaming:
            self._places.load_state_dict(stream)
        self.continue_steps(state_dict)
        # Older checkpoints have no position; Lightning's count of batches is used instead.
        self._resumption.load_state_dict(state_dict.get("position"))
