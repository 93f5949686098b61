"""A causal language model run so that its output embeddings see only the positions whose next label counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from milora_lightning.config import IGNORE_INDEX
from milora_lightning.utils.compat import attention_of
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

# What configurations call what is done to the logits, to each position's by themselves; None where it is nothing.
# Whatever is missing here is noticed in the model's forward, at the price of a second one.
TRANSFORMATIONS = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    *("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier"),
)

# What configurations say of models whose tokens attend to those behind them.
BIDIRECTIONAL = (
    ("is_decoder", (False,)),  # BERT and its kin
    ("causal", (False,)),  # XLM
    ("is_causal", (False,)),
    ("attn_type", ("bi",)),  # XLNet
    ("use_bidirectional_attention", (True, "all")),  # Gemma
)
ALWAYS_CAUSAL = ("gpt_neox", "gpt_neox_japanese")
"""Types of models whose configurations have an ``is_decoder`` that they do not read."""


class Logits(NamedTuple):
    """What a model's forward returned.

    Attributes:
        values: The logits.
        chosen: Whether the output embeddings were called once, and saw what they were meant to see.
        is_heads: Whether, moreover, the logits are what they returned.
    """

    values: Tensor
    chosen: bool
    is_heads: bool


def keeps_logits(config: PretrainedConfig) -> bool:
    """Tell whether a configuration names nothing that is done to the output of the output embeddings.

    >>> from transformers import CohereConfig, GraniteConfig, LlamaConfig
    >>> [keeps_logits(c) for c in (LlamaConfig(), GraniteConfig(), CohereConfig())]
    [True, False, False]
    """
    return all(getattr(c, name, None) is None for c in _configs(config) for name in TRANSFORMATIONS)


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose configuration says that it attends to the tokens which it is to predict.

    Raises:
        ValueError: If it does.
    """
    for config in _configs(model.config):
        for name, values in BIDIRECTIONAL:
            value = getattr(config, name, None)
            if value is not None and value in values and config.model_type not in ALWAYS_CAUSAL:
                raise InvalidInputError(
                    f"{type(model).__name__} with {name}={value!r} in its configuration attends to the tokens that it "
                    "is to predict: load it with another value, or take a causal language model."
                )


def supervised_positions(labels: Tensor) -> Tensor:
    """Tell which positions of the rows (batch, length) have a next label that counts."""
    supervised = torch.zeros_like(labels, dtype=torch.bool)
    supervised[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return supervised


def supervised_logits(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Compute a causal language model's logits at each position whose next label counts.

    The output embeddings see only the hidden states of these positions, which saves the (batch, length, vocabulary)
    tensor, the largest of all. A model that does something unknown to its logits afterwards runs a second time.

    Args:
        model: Any causal language model of transformers.
        input_ids: Token ids (batch, length), padded on the right.
        labels: Labels (batch, length), ``IGNORE_INDEX`` where they do not count.
        position_ids: Positions (batch, length) of packed rows, which begin anew with each example; None where each row
            is an example.

    Returns:
        Logits of shape (supervised tokens, vocabulary).

    Raises:
        ValueError: If the model attends to the tokens that it is to predict.
    """
    input_ids, labels, position_ids = rows_for(model, input_ids, labels, position_ids)
    supervised = supervised_positions(labels)
    logits = run(model, input_ids, lambda _, hidden: hidden[supervised].unsqueeze(0), position_ids)
    if logits.is_heads or (logits.chosen and not keeps_logits(model.config)):
        return logits.values[0]
    return whole_logits(model, input_ids, position_ids)[supervised]


def rows_for(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring packed rows into the form in which a model's attention keeps examples apart.

    By the positions alone transformers' flash attention does it within one row, masks of the others in any number.
    """
    if position_ids is None or "flash" not in attention_of(model):
        return input_ids, labels, position_ids
    return input_ids.reshape(1, -1), labels.reshape(1, -1), position_ids.reshape(1, -1)


def run(
    model: PreTrainedModel,
    input_ids: Tensor,
    substitute: Callable[[Any, Tensor], Tensor],
    position_ids: Tensor | None = None,
) -> Logits:
    """Run a model with other hidden states for its output embeddings.

    Args:
        model: Any causal language model of transformers.
        input_ids: Token ids (batch, length), padded on the right.
        substitute: Given the output embeddings and the hidden states (batch, length, width), returns what these see.
        position_ids: Positions of packed rows.

    Raises:
        ValueError: If the model attends to the tokens that it is to predict.
    """
    check_causal(model)
    head = model.get_output_embeddings()
    followed, stack = _Followed(), ExitStack()

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != input_ids.shape:
            return None
        followed.calls += 1
        return (substitute(module, args[0]), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        stack.enter_context(followed)
        return followed.start(output)

    with stack:
        if head is not None:
            stack.callback(head.register_forward_pre_hook(before).remove)
            stack.callback(head.register_forward_hook(after).remove)
        logits = _forward(model, input_ids, position_ids)
    chosen = followed.calls == 1
    return Logits(logits, chosen, chosen and followed.unchanged(logits))


def whole_logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Compute all logits (batch, length, vocabulary) of a model that does with them what is not known here."""
    _say_that_it_runs_twice(type(model).__name__)
    return _forward(model, input_ids, position_ids)


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return a configuration and that of its text decoder, where it is of several parts."""
    return [config, config.get_text_config(decoder=True)]


def _forward(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    # Only where rows are packed: some models take no positions.
    positions = {} if position_ids is None else {"position_ids": position_ids}
    output = model(input_ids=input_ids, use_cache=False, **positions)
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


class _Followed(TorchFunctionMode):
    """Follows the output of the output embeddings through conversions to where the model returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.versions: list[tuple[Tensor, int]] = []

    def start(self, output: Tensor) -> Tensor:
        """Follow an output, and return it in a form that counts its changes in place."""
        if output.is_inference():
            with torch.inference_mode(False):
                output = output.clone()
        self.versions.append((output, output._version))
        return output

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if (
            function in (Tensor.float, Tensor.double, Tensor.to)
            and self._follows(args[0])
            and _is_as_exact(result, args[0])
        ):
            return self.start(result)
        return result

    def unchanged(self, logits: Tensor) -> bool:
        """Tell whether logits are what the output embeddings returned."""
        return self._follows(logits) and all(tensor._version == version for tensor, version in self.versions)

    def _follows(self, tensor: Tensor) -> bool:
        return any(tensor is known for known, _ in self.versions)


def _is_as_exact(result: Tensor, before: Tensor) -> bool:
    return torch.promote_types(result.dtype, before.dtype) == result.dtype


@cache
def _say_that_it_runs_twice(name: str) -> None:
    warn(
        f"What {name} does to its logits is not known here, so that each of its losses takes a second forward: right, "
        "and slower."
    )
