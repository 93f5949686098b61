"""A key-value cache that is kept from one turn of a conversation to the next."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import takewhile

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from milora_lightning.utils.compat.transformers import takes_dynamic_cache

LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""Types of rotary embeddings with which the keys of early tokens change as the text grows."""


class TurnCache:
    """Keys and values of the last prompt and answer, so that a model reads only the new part of the next prompt.

    Answers are the same as without it, up to the rounding of sums computed in batches of other sizes. A model whose
    cache cannot be cropped exactly (sliding windows, state-space models) reads each prompt from its beginning.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.usable = _can_crop_cache(model)
        self.config = model.config
        self._kept: dict[Hashable, tuple[list[int], DynamicCache]] = {}

    def take(self, who: Hashable, ids: Sequence[int]) -> DynamicCache | None:
        """Return a cache for ``generate`` to start a prompt from, cropped to the tokens it shares with the prompt.

        The cache is removed from here until :meth:`keep` gives it back, because an interrupted answer leaves it in an
        undefined state.

        Args:
            who: Who answers; the model with its adapters and the model without them have different caches.
            ids: Token ids of the prompt.

        Returns:
            The cache, possibly empty; None for a model whose cache cannot be reused.
        """
        if not self.usable:
            return None
        read, cache = self._kept.pop(who, ([], DynamicCache(config=self.config)))
        # The last token of the prompt is always read again: its logits predict the answer.
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(read, ids[:-1], strict=False)))
        cache.crop(common - len(read))
        return cache

    def keep(self, who: Hashable, ids: Sequence[int], cache: DynamicCache | None) -> None:
        """Keep a cache.

        Args:
            who: As for :meth:`take`.
            ids: Token ids of the prompt and its answer, whose last token the model has not read yet.
            cache: What :meth:`take` returned for the prompt.
        """
        if cache is not None:
            self._kept[who] = list(ids[: cache.get_seq_length()]), cache


def _can_crop_cache(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    cache_type = getattr(model.generation_config, "cache_implementation", None)
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    if cache_type is not None or model.config.is_encoder_decoder or not takes_dynamic_cache(model):
        return False
    if "mamba" in type(model).__name__.lower() or any(f"'{kind}'" in rope for kind in LENGTH_DEPENDENT):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
