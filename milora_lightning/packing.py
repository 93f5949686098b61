"""Batches as one sequence: without padding, and with what the rows share, as prompts of one template do, only once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from milora_lightning.arrangement import Packing
from milora_lightning.attention import NAME, PACKING
from milora_lightning.data.batching import IGNORED
from milora_lightning.surgery import adapters_disabled
from milora_lightning.trials import close_logits, once_per_model

SHORTEST = 8  # shorter prefixes save less than it costs to treat them apart


def model_inputs(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Lay a batch out for a model's forward, packed into one sequence where the model can take it so.

    That takes ``attn_implementation="causal_blocks"``, on a CPU, and an architecture without windows and dropout in its
    attention. The sequence holds the prefix that all rows share and, after it, what is left of each row, as far as
    labels that count depend on it: the same function of the same tokens, without repeating the prefix and without
    padding in every layer.

    Args:
        model: Any causal language model of transformers.
        input_ids: Token ids (batch, length), padded on the right.
        labels: Labels (batch, length), ``IGNORED`` where they do not count.

    Returns:
        Arguments of the model's forward, and the positions of their tokens whose next label counts, as a mask of the
        shape of the inputs. The positions come in the order of the batch's rows.
    """
    # First what the model can do: ranks that hold shards of it find out together, whatever their batches are, and
    # devices that cannot pack are spared waiting for the lengths.
    can_pack, supervised = _can_pack(model), _supervised(labels)
    if can_pack and supervised.any():  # all such batches: the compiler would make other code for those not packed
        prefix = shared_prefix(input_ids, labels)
        return _packed(input_ids, supervised, prefix if prefix >= SHORTEST else 0)
    return {"input_ids": input_ids}, supervised


def shared_prefix(input_ids: Tensor, labels: Tensor) -> int:
    """Return how many first tokens all rows of a batch share, before the last one whose next label may count.

    >>> shared_prefix(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]]), torch.tensor([[-100, -100, 7, 8]] * 2))
    1
    """
    if len(input_ids) < 2:
        return 0
    alike = (input_ids == input_ids[:1]).all(0) & (labels == IGNORED).all(0)
    common = int(alike.long().cumprod(0).sum())
    if common == labels.shape[1] or (labels[:, common] != IGNORED).any():
        common -= 1  # its next label is another one in each row
    return max(common, 0)


def _packed(input_ids: Tensor, supervised: Tensor, prefix: int) -> tuple[dict[str, Any], Tensor]:
    own = _needed(supervised)[:, prefix:]
    length = int(own.sum(1).max())

    def packed(x: Tensor) -> Tensor:
        return torch.cat([x[0, :prefix], x[:, prefix:][own]])[None]

    positions = packed(torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids))
    inputs = {
        "input_ids": packed(input_ids),
        "position_ids": positions,
        # Of four dimensions, which transformers passes on as it is, and to which the attention pays no attention.
        "attention_mask": input_ids.new_zeros((), dtype=torch.bool).expand(1, 1, *positions.shape[1:] * 2),
        PACKING: Packing(prefix, len(input_ids), length, own[:, :length].flatten().nonzero()[:, 0]),
    }
    return inputs, packed(supervised)


def _supervised(labels: Tensor) -> Tensor:
    """Tell which positions of the rows have a next label that counts."""
    supervised = torch.zeros_like(labels, dtype=torch.bool)
    supervised[:, :-1] = labels[:, 1:] != IGNORED
    return supervised


def _needed(supervised: Tensor) -> Tensor:
    """Tell on which positions of the rows labels that count depend: those up to the last one that predicts one."""
    return supervised.flip(1).cumsum(1).flip(1) > 0


@once_per_model
def _can_pack(model: PreTrainedModel) -> bool:
    """Whether a model computes the same in both ways; found out by trying."""
    config = model.config.get_text_config()
    uses_blocks = model.config._attn_implementation == NAME and model.device.type == "cpu"
    drops = any(getattr(config, name, None) for name in ("attention_dropout", "attn_pdrop"))
    return uses_blocks and not drops and attends_to_all(model) and _computes_the_same(model)


def attends_to_all(model: PreTrainedModel) -> bool:
    """Whether every layer of a model attends to all tokens before, by what its configuration says."""
    config = model.config.get_text_config()
    windows = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return not windows and layers == {"full_attention"}


@torch.no_grad()
def _computes_the_same(model: PreTrainedModel) -> bool:
    input_ids = torch.tensor([[0, 1, 2, 3, 4, 0], [0, 1, 2, 4, 0, 0]], device=model.device)
    supervised, prefix = torch.zeros_like(input_ids, dtype=torch.bool), 3
    supervised[0, 4] = supervised[1, 3] = True
    inputs, _ = _packed(input_ids, supervised, prefix)
    # Its draws, for dropout, are not to be seen in those of training. Nor are those of trained adapters to tell the two
    # ways apart, in a run that is resumed.
    with torch.random.fork_rng([]), adapters_disabled(model):
        plain = model(input_ids=input_ids, use_cache=False).logits[:, prefix:][_needed(supervised)[:, prefix:]]
        try:
            packed = model(**inputs, use_cache=False).logits[0, prefix:]
        except TypeError:  # its forward has no position_ids, or passes no options on
            return False
    return close_logits(plain, packed, model.dtype)
