"""What an adapter is: rank, scaling, dropout, targets and initialisation, in PEFT's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Init = Literal["milora", "pissa", "middle", "random", "lora"]


@dataclass(frozen=True)
class LoRAConfig:
    """Describes the adapters of a model.

    Args:
        r: Rank of each adapter.
        lora_alpha: Numerator of the scale ``lora_alpha / r``. Defaults to ``r``, a scale of 1,
            as in the MiLoRA paper.
        lora_dropout: Probability with which an adapter's input features are dropped in training.
        target_modules: Which linear layers get an adapter: name endings (``["q_proj", "v_proj"]``), one
            regular expression that has to match a layer's full name, or ``"all-linear"`` for every linear
            layer but the language-model head.
        init: Where the factors start: ``"milora"`` at the smallest singular triplets of the weight,
            ``"pissa"`` at the largest, ``"middle"`` and ``"random"`` at those the paper's ablation compares,
            ``"lora"`` at LoRA's own start (A Kaiming-uniform, B zero).
        modules_to_save: Name endings of modules that are trained in full beside the adapters, for example a
            new classification head.

    Raises:
        ValueError: If a value is out of its range.

    >>> LoRAConfig(r=8).scaling
    1.0
    >>> LoRAConfig(r=8, lora_alpha=16).scaling
    2.0
    """

    r: int = 32
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    init: Init = "milora"
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, not {self.r}.")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be positive, not {self.lora_alpha}; leave it out for lora_alpha=r.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout}.")
        if self.init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))}, not {self.init!r}.")
        if not self.target_modules:
            raise ValueError('target_modules is empty; name layers, or use "all-linear".')

    @property
    def scaling(self) -> float:
        """The factor s = lora_alpha / r in front of the product B A."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.r
