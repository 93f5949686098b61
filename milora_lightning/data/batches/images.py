"""Images in batches: the one placeholder in a text is repeated for each feature of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from transformers import ProcessorMixin

from milora_lightning.data.batches.batching import Example
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

IMAGES = "images"
"""Key of a batch for model inputs other than tokens; absent from a batch without images."""

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class ImageCollator:
    """Collates examples with and without images.

    Images are read when a batch is collated, by the workers that load data. Each example has at most one image.

    Args:
        collator: Collates the tokens.
        processor: The model's processor.
    """

    def __init__(self, collator: Callable[[Sequence[Example]], dict[str, Any]], processor: ProcessorMixin) -> None:
        self.collator = collator
        self.processor = processor

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate examples.

        Args:
            examples: As for the collator of tokens, with the path of an ``image``, which may be empty.

        Returns:
            Its batch, whose rows have a placeholder for each feature of their image; and ``images``, a dict with
            ``pixel_values`` for the images in the order of the rows, absent if there are none.

        Raises:
            ValueError: If an image cannot be read.
        """
        shown = [i for i, example in enumerate(examples) if example["image"]]
        if not shown:
            return self.collator(examples)
        inputs = self._processed([examples[i]["image"] for i in shown])
        placeholder = image_token_id(self.processor)
        numbers = (inputs["input_ids"] == placeholder).sum(-1).tolist()
        expanded = list(examples)
        for i, number in zip(shown, numbers, strict=True):
            expanded[i] = with_placeholders(examples[i], placeholder, number)
        seen = {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}
        return {**self.collator(expanded), IMAGES: seen}

    def _processed(self, paths: list[str]) -> dict[str, Tensor]:
        texts = [self.processor.image_token] * len(paths)
        images = [read_image(path) for path in paths]
        return dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))


def with_placeholders(example: Example, placeholder: int, number: int) -> Example:
    """Repeat the placeholder of an example's image.

    >>> example = {"input_ids": [5, 9, 6, 7], "spans": [3, 4], "prompt_length": 3}
    >>> with_placeholders(example, 9, 3) == {"input_ids": [5, 9, 9, 9, 6, 7], "spans": [5, 6], "prompt_length": 5}
    True
    """
    ids = list(example["input_ids"])
    place = ids.index(placeholder)

    def moved(border: int) -> int:
        return border + number - 1 if border > place else border

    counted: Example = {
        name: moved(example[name]) for name in ("prompt_length", "response_end", "length") if name in example
    }
    spans = [moved(border) for border in example["spans"]]
    return {
        **example,
        "input_ids": ids[:place] + [placeholder] * number + ids[place + 1 :],
        "spans": spans,
        **counted,
    }


def with_their_images(encoded: datasets.Dataset, processor: ProcessorMixin, split: str) -> datasets.Dataset:
    """Drop examples that have lost their image by truncation, with a warning.

    Args:
        encoded: Tokenized examples.
        processor: The model's processor.
        split: Name of the data, for messages.

    Raises:
        ValueError: If the tokenizer has no placeholder for images, a text without an image has one, or no example is
            left.
    """
    placeholder = image_token_id(processor)
    pairs = zip(encoded["image"], encoded["input_ids"], strict=True)
    counts = [(bool(image), ids.count(placeholder)) for image, ids in pairs]
    for row, (has_image, count) in enumerate(counts, 1):
        if count > has_image:
            raise InvalidInputError(
                f"Example {row} of the {split} data has {count} placeholders {processor.image_token!r} and "
                f"{'one image' if has_image else 'no image'}: correct or remove it."
            )
    kept = [i for i, (has_image, count) in enumerate(counts) if count == has_image]
    if len(kept) == len(counts):
        return encoded
    if not kept:
        raise InvalidInputError(
            f"No example of the {split} data has kept the placeholder of its image: raise max_length, and use a "
            "template that writes the user's messages unchanged, such as vicuna."
        )
    warn(
        f"{len(counts) - len(kept)} of {len(counts)} examples of the {split} data lose their image by being truncated: "
        "left out. Raise max_length to keep them."
    )
    return encoded.select(kept)


def image_token_id(processor: ProcessorMixin) -> int:
    """Return the id of a processor's placeholder for images.

    Raises:
        ValueError: If the processor has none.
    """
    token_id = getattr(processor, "image_token_id", None)
    if not isinstance(token_id, int):
        raise InvalidInputError(
            f"{type(processor).__name__} has no placeholder for images in texts, as LLaVA's processor has: use a model "
            "of LLaVA's kind."
        )
    return token_id


def read_image(path: str) -> Any:
    """Read an image from a file, in RGB.

    Raises:
        ValueError: If it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(Path(path)) as image:
            return image.convert("RGB")
    except OSError as error:
        raise InvalidInputError(
            f"The image {path!r} cannot be read ({error}): restore it, or remove its row."
        ) from error
