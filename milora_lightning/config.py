"""The configuration of adapters: rank, scale, dropout, target layers and start, with PEFT's option names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from milora_lightning.starts import find_start
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.patterns import check_parts, check_patterns, first_match

ALL_LINEAR = "all-linear"
AUTO = "auto"
IGNORE_INDEX = -100  # label of the tokens that the loss ignores
DropoutOn = Literal["update", "product"]


@dataclass(frozen=True)
class LoRAConfig:
    """Describes the adapters of a model.

    Args:
        r: Rank of each adapter.
        lora_alpha: Numerator of the scale ``lora_alpha / r``. Defaults to ``r``, a scale of 1,
            as in the MiLoRA paper.
        lora_dropout: Probability with which an adapter's input features are dropped in training.
        target_modules: Which layers get an adapter: name endings (``["q_proj", "v_proj"]``), one
            regular expression that has to match a layer's full name, or ``"all-linear"`` for every linear
            layer but the language-model head. Convolutions get one where a name or expression matches them. Layers
            that were frozen before while other parameters trained (a teacher, a perceptual loss) are only matched by a
            name or expression that matches no layer that trained.
            ``"all-linear"`` and expressions skip layers that are smaller than ``r`` or cannot be adapted.
        init: Where the factors start: ``"milora"`` at the smallest singular triplets of the weight,
            ``"pissa"`` at the largest, ``"random"`` at random ones as in the paper's ablation, ``"middle"`` at those
            in the middle, ``"lora"`` at LoRA's own start (A Kaiming-uniform, B zero), ``"mica"``, ``"olora"`` and
            ``"orthogonal"`` at those of PEFT; directions with singular values, such as ``"gaussian x minor"`` or
            ``"slice 0.25"``; ``"corda"``, ``"lora_null"``, ``"eva"``, ``"astra"``, ``"sc_lora"``, ``"lora_ga"`` and
            ``"lora_one"``, which depend on data; or the name of :func:`milora_lightning.register_start`.
        modules_to_save: Name endings of modules that are trained in full together with the adapters, such as a new
            classification head, or ``"auto"`` for what looks new or is named as a classifier's. They are kept in
            float32 and compute in the model's dtype.
        rank_pattern: Other ranks for some layers, ``{"down_proj": 16}``. A key is a regular expression that matches the
            end of a layer's name, starting after a dot; the first key that matches decides, as in PEFT.
        alpha_pattern: Likewise other values of ``lora_alpha``. A layer that no key matches has ``lora_alpha``, or,
            if that is not given, its rank.
        exclude_modules: Layers that get no adapter although ``target_modules`` matches them: name endings of layers or
            of modules around them, or one regular expression that has to match a full name.
        module: Name of the part that is adapted, such as ``"student"``. All names are then relative to it, only it is
            frozen, and the rest is left alone: a discriminator still trains, a teacher is still frozen.
        dropout_on: Where dropout acts: on the input of the ``"update"``, s (B A − B₀A₀), or of the ``"product"`` s B A
            alone, as PEFT does, with which training does not start at the pretrained model.
        use_rslora: Whether the scale is ``lora_alpha / sqrt(r)`` (rsLoRA, arXiv 2312.03732).
        target_parameters: Which 3-D parameters get adapters, by the ends of their names, as in PEFT
            (``["experts.gate_up_proj"]``): a pair of factors for each matrix in the stack. ``"all-linear"`` includes
            those that hold the experts of a mixture.
        fused_parts: Linear layers whose rows are several projections, each of which gets factors of its own, of rank
            ``r``: ``{"qkv_proj": [2048, 512, 512], "gate_up_proj": 2}``, the rows of each part from the first to the
            last, or the number of equal parts. Keys are as in ``rank_pattern``. Layers that no key matches are one
            matrix.

    Raises:
        ValueError: If a value is out of its range.

    >>> LoRAConfig(r=8).scaling
    1.0
    >>> LoRAConfig(r=8, lora_alpha=16).scaling
    2.0
    >>> config = LoRAConfig(r=8, rank_pattern={"down_proj": 4})
    >>> config.rank("layers.0.q_proj"), config.rank("layers.0.down_proj"), config.alpha("layers.0.down_proj")
    (8, 4, 4.0)
    """

    r: int = 32
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    init: str = "milora"
    modules_to_save: str | Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | Sequence[str] = ()
    module: str | None = None
    dropout_on: DropoutOn = "update"
    use_rslora: bool = False
    target_parameters: Sequence[str] = ()
    fused_parts: Mapping[str, int | Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InvalidInputError(f"r must be at least 1, not {self.r}.")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise InvalidInputError(
                f"lora_alpha must be positive, not {self.lora_alpha}; leave it out for lora_alpha=r."
            )
        if not 0 <= self.lora_dropout < 1:
            raise InvalidInputError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout}.")
        if self.dropout_on not in get_args(DropoutOn):
            raise InvalidInputError(f"dropout_on must be update or product, not {self.dropout_on!r}.")
        object.__setattr__(self, "init", find_start(self.init).name)  # what computes the same has one name
        if isinstance(self.target_parameters, str):
            raise InvalidInputError(f"target_parameters takes a list of names: [{self.target_parameters!r}].")
        if not self.target_modules and not self.target_parameters:
            raise InvalidInputError('target_modules is empty; name layers, or use "all-linear".')
        check_patterns("rank_pattern", self.rank_pattern, whole=True)
        check_patterns("alpha_pattern", self.alpha_pattern)
        check_parts("fused_parts", self.fused_parts)
        if isinstance(self.modules_to_save, str) and self.modules_to_save != AUTO:
            raise InvalidInputError(f'modules_to_save takes a list of names: [{self.modules_to_save!r}], or "{AUTO}".')

    @property
    def scaling(self) -> float:
        """The scale s = lora_alpha / r of the product B A, for layers that no pattern matches."""
        return (self.lora_alpha or self.r) / (math.sqrt(self.r) if self.use_rslora else self.r)

    def rank(self, name: str) -> int:
        """Return the rank of the layer with this name."""
        return first_match(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """Return ``lora_alpha`` of the layer with this name; rsLoRA's scale is that of √r as much."""
        r = self.rank(name)
        return float(first_match(self.alpha_pattern, name, self.lora_alpha or r)) * (
            math.sqrt(r) if self.use_rslora else 1
        )

    def scale(self, name: str) -> float:
        """Return the scale s of the layer with this name."""
        return self.alpha(name) / self.rank(name)

    def given_parts(self, name: str) -> int | Sequence[int] | None:
        """Return what ``fused_parts`` says about the layer with this name; None for nothing."""
        return first_match(self.fused_parts, name, None)

    def parts(self, name: str, out_features: int) -> tuple[int, ...]:
        """Return the rows of each part of the layer with this name and so many rows; empty if it is one matrix.

        >>> LoRAConfig(fused_parts={"gate_up_proj": 2}).parts("mlp.gate_up_proj", 8)
        (4, 4)
        """
        given = self.given_parts(name)
        return (out_features // given,) * given if isinstance(given, int) else tuple(given or ())
