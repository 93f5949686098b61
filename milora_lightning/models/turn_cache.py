"""What a model has read of a conversation, kept from one turn to the next."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import takewhile

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from milora_lightning.utils.compat import takes_dynamic_cache

LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""Kinds of rotary embeddings with which the keys of early tokens are others in a longer text."""


class TurnCache:
    """Keys and values of what a model has read last, so that it reads of the next prompt only what is new.

    Answers are those without it, as far as sums of floating-point numbers do not hang on how many are computed at once.
    A model whose cache cannot go back to an earlier token exactly (sliding windows, the states of state-space models)
    reads each prompt from its beginning.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.usable = _goes_back(model)
        self.config = model.config
        self._kept: dict[Hashable, tuple[list[int], DynamicCache]] = {}

    def take(self, who: Hashable, ids: Sequence[int]) -> DynamicCache | None:
        """Return a cache that ``generate`` may begin a prompt with, cut to what the prompt has in common with it.

        It is kept no longer, unless it comes back by :meth:`keep`: an answer that is broken off leaves it half written.

        Args:
            who: Who is to answer: a model with adapters and without them read differently.
            ids: Token ids of the prompt.

        Returns:
            The cache, perhaps empty; None for a model whose cache cannot be used again.
        """
        if not self.usable:
            return None
        read, cache = self._kept.pop(who, ([], DynamicCache(config=self.config)))
        # The prompt's last token is read again in any case: what follows it is asked for.
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(read, ids[:-1], strict=False)))
        cache.crop(common - len(read))
        return cache

    def keep(self, who: Hashable, ids: Sequence[int], cache: DynamicCache | None) -> None:
        """Keep a cache.

        Args:
            who: As for :meth:`take`.
            ids: Token ids of the prompt and its answer, whose last token has not been read.
            cache: What :meth:`take` has returned for the prompt.
        """
        if cache is not None:
            self._kept[who] = list(ids[: cache.get_seq_length()]), cache


def _goes_back(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    own = getattr(model.generation_config, "cache_implementation", None)
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    if own is not None or model.config.is_encoder_decoder or not takes_dynamic_cache(model):
        return False
    if "mamba" in type(model).__name__.lower() or any(f"'{kind}'" in rope for kind in LENGTH_DEPENDENT):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
