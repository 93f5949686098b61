"""The registry of starts: each has a name, a function that computes A₀ and B₀ from a weight, and declared properties.

Whether a factor stays frozen, and whether B₀A₀ is zero, decides which parameters an adapter has. This must be known
before there are weights (on the meta device, when a checkpoint is read), so it is declared with the name, not computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from milora_lightning.linalg.singular import SingularSlice
from milora_lightning.starts import activations, algebra, gradients, methods
from milora_lightning.starts.statistics import Need, Statistics
from milora_lightning.utils.errors import InvalidInputError

Factor = Literal["lora_A", "lora_B"]


StartFunction = Callable[
    [Tensor, int, Statistics | None, torch.Generator | None], SingularSlice | tuple[Tensor, Tensor]
]
"""Computes the start of a layer from its weight (out, in), its rank, its statistics, and a CPU generator: either
A₀ (r, in) and B₀ (out, r) as the layer stores them, or triplets, whose part of the weight becomes s B₀A₀."""


@dataclass(frozen=True)
class Start:
    """A start and its declared properties.

    Attributes:
        name: The canonical name, as configurations and checkpoints write it.
        compute: The function; see :data:`StartFunction`.
        frozen: The factor that keeps its initial value, ``"lora_A"`` or ``"lora_B"``; None if both train.
        zero_product: Whether A₀ or B₀ is zero, as in LoRA. Then no copies of them are needed.
        any_rank: Whether the rank may exceed the shorter side of the weight.
        random: Whether it uses the generator.
        needs: The entries of :class:`Statistics` that it uses.
        keeps: Whether its ``inputs`` may come from data to be preserved instead of the training data.
        vectors: How many singular vectors it uses per rank.
        key: Identifies the start in the cache; None if results are not cached.
        registered: Whether a user has registered it.
    """

    name: str
    compute: StartFunction
    frozen: Factor | None = None
    zero_product: bool = False
    any_rank: bool = False
    random: bool = False
    needs: tuple[Need, ...] = ()
    keeps: bool = False
    vectors: int = 1
    key: str | None = None
    registered: bool = False


_METHODS = (
    Start("lora", methods.lora, zero_product=True, any_rank=True, random=True),
    Start("mica", methods.mica, frozen="lora_B", zero_product=True, key="mica"),
    Start("olora", methods.olora),
    Start("orthogonal", methods.orthogonal, any_rank=True, random=True),
    Start("corda", activations.corda, needs=("inputs",), keeps=True, key="corda"),
    Start("corda_ipm", activations.corda_ipm, needs=("inputs",), key="corda_ipm"),
    Start("lora_null", activations.lora_null, needs=("inputs",), keeps=True, key="lora_null"),
    Start("eva", activations.eva, zero_product=True, needs=("inputs",), key="eva"),
    Start("astra", activations.astra, needs=("inputs",), key="astra"),
    Start("astra_ipm", activations.astra_ipm, needs=("inputs",), key="astra_ipm"),
    Start("sc_lora", activations.sc_lora, needs=("inputs", "preserved"), key="sc_lora"),
    Start("lora_ga", gradients.lora_ga, needs=("gradient",), vectors=2, key="lora_ga"),
    Start("lora_one", gradients.lora_one, needs=("gradient",), key="lora_one"),
)
_REGISTERED: dict[str, Start] = {start.name: start for start in _METHODS}


def find_start(name: str) -> Start:
    """Return the start that a configuration names.

    Args:
        name: A method such as ``"milora"``, directions and singular values such as ``"gaussian x minor"``, or a
            registered name.

    Raises:
        ValueError: If there is no such start.

    >>> find_start("minor").name, find_start("gaussian x minor x 0.50").name, find_start("mica").frozen
    ('milora', 'gaussian x minor x 0.5', 'lora_B')
    >>> find_start("sc_lora 0.80").name
    'sc_lora 0.8'
    """
    known = isinstance(name, str)
    if known and name in _REGISTERED:
        return _REGISTERED[name]
    if known and name.startswith("sc_lora "):
        return _sc_lora(name)
    if known and (part := algebra.parse(name)) is not None:
        return Start(part.name, part.triplets, random=part.random, key=part.name)
    raise InvalidInputError(
        f"init={name!r} is no start: take one of {', '.join([*algebra.METHODS, *sorted(_REGISTERED)])}, or directions "
        f"({', '.join(algebra.DIRECTIONS)} or slice 0.25) x singular values ({', '.join(algebra.VALUES)}), such as "
        "'minor x principal'. One of your own has to be registered first: import the module that calls register_start."
    )


def _sc_lora(name: str) -> Start:
    """Parse the balance β after SC-LoRA's name."""
    try:
        balance = float(name.removeprefix("sc_lora "))
    except ValueError:
        balance = math.nan
    if not 0 <= balance <= 1:
        raise InvalidInputError(
            f"init={name!r} needs the weight of what is to be preserved, from 0 (none) to 1: 'sc_lora 0.8'."
        )
    start = _REGISTERED["sc_lora"]
    if balance == activations.BALANCE:
        return start
    named = f"sc_lora {balance:g}"
    return replace(start, name=named, compute=partial(activations.sc_lora, balance=balance), key=named)


def register_start(
    name: str,
    *,
    frozen: Factor | None = None,
    zero_product: bool = False,
    any_rank: bool = False,
    version: str | int | None = None,
    needs: Sequence[Need] = (),
) -> Callable[[StartFunction], StartFunction]:
    """Register a function that computes A₀ and B₀ under a name for ``init``, also on the command line.

    The function is called as ``function(weight, r, statistics, generator)`` for one layer at a time (for one group of a
    grouped convolution), on one rank, without gradients, and possibly in several threads for different layers.
    ``weight`` is a copy of shape (out, in), in float32 or float64. Random numbers must come from ``generator``, a CPU
    generator that depends on the seed and the layer's name. ``statistics`` are those that
    :func:`milora_lightning.initialize` was given for the layer, or None.

    It returns A₀ (r, in) and B₀ (out, r), or a :class:`milora_lightning.linalg.SingularSlice`, which becomes A₀ =
    √(S/s) Vᵀ and B₀ = U √(S/s) with the layer's scale s. In either case the layer computes W x + s (B A − B₀A₀) x and
    starts at the pretrained model.

    Args:
        name: A word of letters, digits, ``_``, ``-`` and dots.
        frozen: A factor that keeps its initial value: ``"lora_A"`` or ``"lora_B"``.
        zero_product: Whether A₀ or B₀ is zero. Then no copies of them are stored, and exports have rank r.
        any_rank: Whether r may exceed the shorter side of a weight.
        version: Version under which results are kept in the cache of decompositions. Change it whenever the function's
            results change. By default nothing is cached.
        needs: The ``statistics`` that it uses: ``["inputs"]``, ``["gradient"]`` or ``["inputs", "preserved"]``. In
            ``fit``, :class:`milora_lightning.MiLoRAInit` collects them first.

    Returns:
        A decorator, which returns the function unchanged.

    Raises:
        ValueError: If the name is taken or not such a word.

    >>> @register_start("zeros_in_A", zero_product=True)
    ... def zeros_in_A(weight, r, statistics, generator):
    ...     return torch.zeros(r, weight.shape[1]), torch.randn(weight.shape[0], r, generator=generator)
    >>> find_start("zeros_in_A").zero_product
    True
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
        raise InvalidInputError(f"A start cannot be named {name!r}: take a word, as in @register_start('my_start').")
    present = _REGISTERED.get(name)
    if name == "full" or algebra.parse(name) is not None or (present is not None and not present.registered):
        raise InvalidInputError(f"There is a start {name!r} already: give yours another name.")
    if frozen not in (None, "lora_A", "lora_B"):
        raise InvalidInputError(f"frozen must be 'lora_A', 'lora_B' or None, not {frozen!r}.")
    if isinstance(needs, str) or not set(needs) <= set(get_args(Need)):
        raise InvalidInputError(f"needs must be a list of some of {', '.join(get_args(Need))}, not {needs!r}.")

    def register(function: StartFunction) -> StartFunction:
        other = None if present is None else present.compute
        # The same origin when a notebook cell or module runs again.
        if other is not None and _origin(other) != _origin(function):
            raise InvalidInputError(f"{_origin(other)} is registered as {name!r} already: give yours another name.")
        key = None if version is None else f"{_origin(function)} {name} {version}"
        options = frozen, zero_product, any_rank, True, tuple(needs)
        _REGISTERED[name] = Start(name, function, *options, key=key, registered=True)
        return function

    return register


def _origin(function: StartFunction) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
