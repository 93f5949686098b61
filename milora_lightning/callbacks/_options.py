"""Conversion of MiLoRAInit's options to a configuration of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from milora_lightning.config import LoRAConfig
from milora_lightning.utils.errors import InvalidInputError


def adapter_config(
    r: int,
    lora_alpha: float | Literal["2r"] | None,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    modules_to_save: str | Sequence[str] | None,
    exclude_modules: str | Sequence[str] | None,
    target_parameters: Sequence[str] | None,
    fused_parts: Mapping[str, int | Sequence[int]] | None = None,
    **others: Any,
) -> LoRAConfig:
    """Create a configuration from options as in YAML files: lists, null, and ``"2r"`` for twice each rank.

    Args:
        r: As in :class:`LoRAConfig`.
        lora_alpha: As in :class:`LoRAConfig`, or ``"2r"``.
        rank_pattern: As in :class:`LoRAConfig`; None for none, as in all of the following.
        alpha_pattern: As in :class:`LoRAConfig`.
        modules_to_save: As in :class:`LoRAConfig`.
        exclude_modules: As in :class:`LoRAConfig`.
        target_parameters: As in :class:`LoRAConfig`.
        fused_parts: As in :class:`LoRAConfig`.
        **others: Further arguments of :class:`LoRAConfig`.

    Raises:
        ValueError: If a value is out of its range.

    >>> adapter_config(8, "2r", {"down_proj": 4}, None, ["head"], None, None).alpha("down_proj")
    8.0
    """
    ranks, alphas, alpha = dict(rank_pattern or {}), dict(alpha_pattern or {}), lora_alpha
    if alpha == "2r":
        alpha, alphas = 2.0 * r, {**alphas, **{key: 2.0 * rank for key, rank in ranks.items() if key not in alphas}}
    return LoRAConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=_names(modules_to_save),
        exclude_modules=_names(exclude_modules),
        target_parameters=tuple(target_parameters or ()),
        fused_parts=dict(fused_parts or {}),
        **others,
    )


def check_start_from(
    start_from: str | None,
    fused_parts: Mapping[str, Any] | None,
    decay_to_start: float = 0.0,
    statistics_batches: int | None = None,
    preserve: str | None = None,
) -> None:
    """Refuse options that have no meaning in a run that starts from a PEFT folder.

    Raises:
        ValueError: If one of them is given.
    """
    no_data = "the factors are those of a PEFT folder, and nothing is computed from data"
    for name, given, reason in (
        ("fused_parts", fused_parts, "the factors of a PEFT folder belong to whole layers"),
        ("decay_to_start", decay_to_start, "a PEFT folder holds updates, which would decay to zero, not to themselves"),
        ("statistics_batches", statistics_batches, no_data),
        ("preserve", preserve, no_data),
    ):
        if start_from is not None and given:
            raise InvalidInputError(f"{name} cannot be used with start_from: {reason}.")


def _names(names: str | Sequence[str] | None) -> str | Sequence[str]:
    return names if isinstance(names, str) else tuple(names or ())
