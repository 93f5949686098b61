"""The settings of an adapter, and comparing those of two adapters of a layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.config import LoRAConfig

Settings = Mapping[str, Any]
"""The settings of an adapter by their names."""


def configured_settings(config: LoRAConfig, name: str, out_features: int) -> Settings:
    """Return the settings that a configuration gives to the adapter of a layer.

    Args:
        config: The configuration.
        name: The layer's name.
        out_features: Its number of output features.
    """
    dropout, parts = (config.lora_dropout, config.dropout_on), config.parts(name, out_features)
    return _settings(config.rank(name), config.scale(name), *dropout, config.init, parts)


def settings_of(layer: LoRALinear) -> Settings:
    """Return the settings that an adapter has."""
    return _settings(layer.r, layer.scaling, layer.lora_dropout, layer.dropout_on, layer.init, layer.parts)


def _settings(
    r: int, scaling: float, lora_dropout: float, dropout_on: str, init: str, parts: tuple[int, ...]
) -> Settings:
    dropout = {"lora_dropout": lora_dropout, "dropout_on": dropout_on}
    return {"r": r, "lora_alpha / r": scaling, **dropout, "init": init, "fused_parts": parts}


def first_difference(one: Settings, other: Settings, ignore: Collection[str] = ()) -> str | None:
    """Return the name of the first setting in which two adapters differ; None if they are equal.

    Args:
        one: Settings of one adapter.
        other: Settings of the other.
        ignore: Names of settings that may differ.

    >>> one, other = (configured_settings(LoRAConfig(r=r), "0", 16) for r in (8, 4))
    >>> first_difference(one, other)
    'r'
    """
    return next((key for key in one if key not in ignore and one[key] != other[key]), None)
