"""Forward pass of causal language models that applies the output embeddings only where the next label counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from milora_lightning.models.positions import at_positions, supervised_positions
from milora_lightning.models.segments import Positions, attention_arguments
from milora_lightning.utils.compat.transformers import attention_of
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

# Configuration entries for operations on the logits, each applied position by position; None where there is none.
# Operations missing here are noticed in the model's forward, at the price of a second forward.
LOGIT_OPERATIONS = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    *("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier"),
)

# Configuration entries, and their values, of models whose tokens attend to later tokens.
BIDIRECTIONAL = (
    ("is_decoder", (False,)),  # BERT and similar models
    ("causal", (False,)),  # XLM
    ("is_causal", (False,)),
    ("attn_type", ("bi",)),  # XLNet
    ("use_bidirectional_attention", (True, "all")),  # Gemma
)
ALWAYS_CAUSAL = ("gpt_neox", "gpt_neox_japanese")
"""Model types whose configurations have an ``is_decoder`` that the model does not read."""


class Logits(NamedTuple):
    """The result of a model's forward.

    Attributes:
        values: The logits.
        substituted: Whether the output embeddings were called exactly once, with the substituted hidden states.
        unchanged: Whether, in addition, the model returned their output without changing it.
    """

    values: Tensor
    substituted: bool
    unchanged: bool


def may_change_logits(config: PretrainedConfig) -> bool:
    """Return whether a configuration names an operation on the logits, such as a scale or a soft cap.

    >>> from transformers import CohereConfig, GraniteConfig, LlamaConfig
    >>> [may_change_logits(c) for c in (LlamaConfig(), GraniteConfig(), CohereConfig())]
    [False, True, True]
    """
    return any(getattr(c, name, None) is not None for c in _configs(config) for name in LOGIT_OPERATIONS)


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose configuration says that it attends to the tokens that it should predict.

    Raises:
        ValueError: If it does so.
    """
    for config in _configs(model.config):
        for name, values in BIDIRECTIONAL:
            value = getattr(config, name, None)
            if value is not None and value in values and config.model_type not in ALWAYS_CAUSAL:
                raise InvalidInputError(
                    f"{type(model).__name__} with {name}={value!r} in its configuration attends to the tokens that it "
                    "should predict: load it with another value, or use a causal language model."
                )


def supervised_logits(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Positions = None, **inputs: Tensor
) -> Tensor:
    """Compute a causal language model's logits at each position whose next label counts.

    The output embeddings are applied only to the hidden states of these positions, which saves the (batch, length,
    vocabulary) tensor, the largest of all. A model that then does something unknown to its logits runs a second time.

    Args:
        model: Any causal language model of transformers.
        input_ids: Token ids (batch, length), padded on the right.
        labels: Labels (batch, length), ``IGNORE_INDEX`` where they do not count.
        position_ids: Positions (batch, length) of packed rows, starting from 0 in each example, or the segments of a
            single row; None if each row is one example.
        inputs: What else the model takes, such as ``pixel_values``.

    Returns:
        Logits of shape (supervised tokens, vocabulary).

    Raises:
        ValueError: If the model attends to the tokens that it should predict.
    """
    positions = supervised_positions(labels)
    input_ids, position_ids = attention_rows(model, input_ids, position_ids)
    logits = run_with_hidden_states(
        model, input_ids, lambda _, hidden: at_positions(hidden, positions).unsqueeze(0), position_ids, **inputs
    )
    if logits.unchanged or (logits.substituted and may_change_logits(model.config)):
        return logits.values[0]
    return at_positions(all_logits(model, input_ids, position_ids, **inputs), positions)


def attention_rows(model: PreTrainedModel, input_ids: Tensor, position_ids: Positions) -> tuple[Tensor, Positions]:
    """Reshape packed rows so that a model's attention keeps the examples apart.

    From positions alone, transformers' flash attention does so only within a single row; the masks of the other
    implementations work with any number of rows.
    """
    if not isinstance(position_ids, Tensor) or "flash" not in attention_of(model):
        return input_ids, position_ids
    return input_ids.reshape(1, -1), position_ids.reshape(1, -1)


def run_with_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    substitute: Callable[[Any, Tensor], Tensor],
    position_ids: Positions = None,
    **inputs: Tensor,
) -> Logits:
    """Run a model, passing substituted hidden states to its output embeddings.

    Args:
        model: Any causal language model of transformers.
        input_ids: Token ids (batch, length), padded on the right.
        substitute: Given the output embeddings and their hidden states (batch, length, width), returns the hidden
            states to use instead.
        position_ids: Positions of packed rows.
        inputs: What else the model takes, such as ``pixel_values``.

    Raises:
        ValueError: If the model attends to the tokens that it should predict.
    """
    check_causal(model)
    head = model.get_output_embeddings()
    tracker, stack = _OutputTracker(), ExitStack()

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != input_ids.shape:
            return None
        tracker.calls += 1
        return (substitute(module, args[0]), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        stack.enter_context(tracker)
        return tracker.track(output)

    with stack:
        if head is not None:
            stack.callback(head.register_forward_pre_hook(before).remove)
            stack.callback(head.register_forward_hook(after).remove)
        logits = _forward(model, input_ids, position_ids, **inputs)
    substituted = tracker.calls == 1
    return Logits(logits, substituted, substituted and tracker.is_unchanged(logits))


def all_logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Positions = None, **inputs: Tensor) -> Tensor:
    """Compute all logits (batch, length, vocabulary), for a model that changes its logits in an unknown way."""
    _warn_of_second_forward(type(model).__name__)
    return _forward(model, input_ids, position_ids, **inputs)


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return a configuration and that of its text decoder (the same one for a text-only model)."""
    return [config, config.get_text_config(decoder=True)]


def _forward(model: PreTrainedModel, input_ids: Tensor, position_ids: Positions, **inputs: Tensor) -> Tensor:
    output = model(input_ids=input_ids, use_cache=False, **attention_arguments(model, position_ids), **inputs)
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


class _OutputTracker(TorchFunctionMode):
    """Tracks the output of the output embeddings through dtype conversions, up to where the model returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.versions: list[tuple[Tensor, int]] = []

    def track(self, output: Tensor) -> Tensor:
        """Track an output; return it as a tensor that counts in-place changes, which inference tensors do not."""
        if output.is_inference():
            with torch.inference_mode(False):
                output = output.clone()
        self.versions.append((output, output._version))
        return output

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if (
            function in (Tensor.float, Tensor.double, Tensor.to)
            and self._is_tracked(args[0])
            and torch.promote_types(result.dtype, args[0].dtype) == result.dtype  # loses no precision
        ):
            return self.track(result)
        return result

    def is_unchanged(self, logits: Tensor) -> bool:
        """Return whether the logits are exactly what the output embeddings returned."""
        return self._is_tracked(logits) and all(tensor._version == version for tensor, version in self.versions)

    def _is_tracked(self, tensor: Tensor) -> bool:
        return any(tensor is tracked for tracked, _ in self.versions)


@cache
def _warn_of_second_forward(name: str) -> None:
    warn(
        f"{name} changes its logits in a way that is not known here, so each loss takes a second forward: the loss is "
        "right, but slower."
    )
