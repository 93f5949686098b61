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
IGNORE_INDEX = -100  # label of tokens that the loss ignores
DropoutOn = Literal["update", "product"]


@dataclass(frozen=True)
class LoRAConfig:
    """Describes the adapters of a model.

    Args:
        r: Rank of each adapter.
        lora_alpha: Numerator of the scale ``lora_alpha / r``. Defaults to ``r``, a scale of 1,
            as in the MiLoRA paper.
        lora_dropout: Probability with which an adapter's input features are dropped in training.
        target_modules: Which layers get an adapter: a list of name endings (``["q_proj", "v_proj"]``), one regular
            expression that must match a layer's full name, or ``"all-linear"`` for every linear layer except the
            language-model head. Convolutions are adapted if a name or expression matches them. Layers that were already
            frozen while other parameters trained (a teacher, a perceptual loss) are adapted only if a name or
            expression matches no trainable layer. ``"all-linear"`` and expressions skip layers that are smaller than
            ``r`` or cannot be adapted.
        init: Where the factors start: ``"milora"`` at the smallest singular triplets of the weight, ``"pissa"`` at the
            largest, ``"random"`` at random ones as in the paper's ablation, ``"middle"`` at those in the middle;
            ``"lora"`` as in LoRA (A Kaiming-uniform, B zero); ``"mica"``, ``"olora"`` and ``"orthogonal"`` as in PEFT;
            directions with singular values, such as ``"gaussian x minor"`` or ``"slice 0.25"``; ``"corda"``,
            ``"lora_null"``, ``"eva"``, ``"astra"``, ``"sc_lora"``, ``"lora_ga"`` and ``"lora_one"``, which depend on
            data; or a name registered with :func:`milora_lightning.register_start`.
        modules_to_save: Name endings of modules that are trained in full together with the adapters, such as a new
            classification head, or ``"auto"`` for layers that look newly initialized or are named like a classifier.
            They are kept in float32 and compute in the model's dtype.
        rank_pattern: Different ranks for some layers: ``{"down_proj": 16}``. A key is a regular expression that matches
            the end of a layer's name, starting after a dot; the first key that matches decides, as in PEFT.
        alpha_pattern: Different values of ``lora_alpha``, likewise. A layer that no key matches uses ``lora_alpha`` or,
            if that is not given, its rank.
        exclude_modules: Layers that get no adapter even if ``target_modules`` matches them: name endings of layers or
            of their parent modules, or one regular expression that must match a full name.
        module: Name of the submodule to adapt, such as ``"student"``. All names are then relative to it, and only it is
            frozen. The rest of the model is left alone: a discriminator still trains, a teacher stays frozen.
        dropout_on: Where dropout acts: on the input of the whole ``"update"``, s (B A − B₀A₀), or only of the
            ``"product"``, s B A, as in PEFT; with the latter, training does not start at the pretrained model.
        use_rslora: Whether the scale is ``lora_alpha / sqrt(r)`` (rsLoRA, arXiv 2312.03732).
        target_parameters: Name endings of 3-D parameters that get adapters, as in PEFT (``["experts.gate_up_proj"]``):
            a pair of factors for each matrix in the stack. ``"all-linear"`` includes the experts of a mixture.
        fused_parts: Linear layers that fuse several projections, each of which gets separate factors of rank ``r``:
            ``{"qkv_proj": [2048, 512, 512], "gate_up_proj": 2}``, with the number of rows of each part, or the number
            of equal parts. Keys are as in ``rank_pattern``. A layer that no key matches counts as one matrix.

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
        object.__setattr__(self, "init", find_start(self.init).name)  # one canonical name per start
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
        """Return ``lora_alpha`` of the layer with this name; rsLoRA's scale amounts to √r times as much."""
        r = self.rank(name)
        return float(first_match(self.alpha_pattern, name, self.lora_alpha or r)) * (
            math.sqrt(r) if self.use_rslora else 1
        )

    def scale(self, name: str) -> float:
        """Return the scale s of the layer with this name."""
        return self.alpha(name) / self.rank(name)

    def given_parts(self, name: str) -> int | Sequence[int] | None:
        """Return the entry of ``fused_parts`` for the layer with this name, or None."""
        return first_match(self.fused_parts, name, None)

    def parts(self, name: str, out_features: int) -> tuple[int, ...]:
        """Return the rows of each part of the layer with this name and ``out_features`` rows; empty for one matrix.

        >>> LoRAConfig(fused_parts={"gate_up_proj": 2}).parts("mlp.gate_up_proj", 8)
        (4, 4)
        """
        given = self.given_parts(name)
        return (out_features // given,) * given if isinstance(given, int) else tuple(given or ())
