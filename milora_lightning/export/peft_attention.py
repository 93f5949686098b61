"""PEFT's format for ``nn.MultiheadAttention``: one layer, whose two projections have the same rank and scale.

In PEFT, the factors of ``in_proj`` belong to the attention module, and those of ``out_proj`` to a layer inside it. In
this package both are separate adapters. A projection without an adapter gets zeros in PEFT, and the lower of two ranks
is padded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from milora_lightning.adapters.attention import is_attention
from milora_lightning.adapters.parts import modules_by_name

IN, OUT = "in_proj", "out_proj"
INSIDE = ".base_layer.out_proj"
TWICE = (
    "this version of PEFT adds the update of out_proj of an nn.MultiheadAttention twice (leave it out: "
    "exclude_modules: [out_proj])"
)
Pair = tuple[Tensor, Tensor]


def attentions(model: nn.Module, names: Iterable[str]) -> dict[str, nn.MultiheadAttention]:
    """Return the attention modules, by name, to which adapters with these names belong."""
    owners, modules = dict.fromkeys(name.rpartition(".")[0] for name in names), modules_by_name(model)
    return {n: m for n in owners if isinstance(m := modules.get(n), nn.MultiheadAttention)}


def objection_to_attention(attention: nn.Module, name: str) -> str | None:
    """Return the reason why PEFT does not support an adapter of a projection; None if it does."""
    if not isinstance(attention, nn.MultiheadAttention):
        return None
    if attention._parameters.get(f"{IN}_weight") is None:
        return "it adapts an nn.MultiheadAttention only if one weight holds query, key and value"
    if name == OUT and not is_attention(attention):
        return f"{name} of an nn.MultiheadAttention is read, not called, and its adapter there has no effect"
    return TWICE if name == OUT and counts_twice() else None


@cache
def counts_twice() -> bool:
    """Whether the installed PEFT adds the update of ``out_proj`` twice, as 0.21 does; tested on a small module."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=()), torch.no_grad():
        attention, x = nn.MultiheadAttention(2, 1), torch.ones(1, 2)
        attention.out_proj.weight.zero_()
        attention.in_proj_weight.fill_(1.0)  # so that the output is the update's
        peft: Any = inject_adapter_in_model(
            LoraConfig(r=1, lora_alpha=1, target_modules=["0"]), nn.Sequential(attention)
        )
        inside = peft[0].base_layer.out_proj
        inside.lora_A["default"].weight.fill_(1.0)
        inside.lora_B["default"].weight.fill_(1.0)
        return bool((peft[0](x, x, x)[0] > 6).all())  # one update gives 4


def target_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the name of each layer in PEFT's configuration: for projections, the name of their attention."""
    found = attentions(model, names := list(names))
    return {name: owner if (owner := name.rpartition(".")[0]) in found else name for name in names}


def with_partners(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return names and those of the other projections that PEFT adapts together with them."""
    found = attentions(model, names := list(names))
    both = {f"{name}.{projection}" for name in found for projection in (IN, OUT)}
    return [*names, *sorted(both - set(names))]


@torch.no_grad()
def complete(model: nn.Module, pairs: dict[str, Pair], ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """Give the two projections of each attention module factors of one rank and one scale, in place.

    Args:
        model: The model.
        pairs: A (n, in) and B (out, n) of each layer.
        ranks: The rank n of each.
        alphas: ``lora_alpha`` of each.
    """
    for name, module in attentions(model, pairs).items():
        present = [key for key in (f"{name}.{IN}", f"{name}.{OUT}") if key in pairs]
        rank, scale = max(ranks[key] for key in present), alphas[present[0]] / ranks[present[0]]
        for key, outputs in ((f"{name}.{IN}", 3 * module.embed_dim), (f"{name}.{OUT}", module.embed_dim)):
            like = pairs[present[0]][0]
            A, B = pairs.get(key, (like.new_zeros(0, module.embed_dim), like.new_zeros(outputs, 0)))
            factor = alphas[key] / ranks[key] / scale if key in present else 1.0
            more = rank - len(A)
            pairs[key] = nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(factor * B, (0, more))
            ranks[key], alphas[key] = rank, scale * rank


def place_in_peft(name: str, owners: Collection[str]) -> str:
    """Return the name of PEFT's layer for an adapter, given the names of the attention modules.

    >>> place_in_peft("block.attn.in_proj", ["block.attn"]), place_in_peft("block.attn.out_proj", ["block.attn"])
    ('block.attn', 'block.attn.base_layer.out_proj')
    """
    owner, _, projection = name.rpartition(".")
    if owner not in owners:
        return name
    return owner if projection == IN else f"{owner}{INSIDE}"


def own_names(places: Iterable[str]) -> dict[str, str]:
    """Map names of PEFT's layers to those of adapters here; attention modules are recognized by the layers inside.

    >>> own_names(["attn", "attn.base_layer.out_proj", "fc"])
    {'attn': 'attn.in_proj', 'attn.base_layer.out_proj': 'attn.out_proj', 'fc': 'fc'}
    """
    places = list(places)
    owners = {place.removesuffix(INSIDE) for place in places if place.endswith(INSIDE)}
    named = {owner: f"{owner}.{IN}" for owner in owners}
    inside = {f"{owner}{INSIDE}": f"{owner}.{OUT}" for owner in owners}
    return {place: named.get(place, inside.get(place, place)) for place in places}
