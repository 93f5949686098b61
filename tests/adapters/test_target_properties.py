"""Which layers a name means, in modules of any names that hypothesis makes up."""

from __future__ import annotations

import re
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from milora_lightning import LoRAConfig, adapters_disabled, initialize, inject
from milora_lightning.adapters.parts import TargetNotFoundError
from milora_lightning.adapters.targets import find_targets

few = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
part = st.sampled_from(["q", "proj", "q_proj", "x_q", "mlp", "0", "10"])
tree = st.recursive(st.none(), lambda inner: st.dictionaries(part, inner, min_size=1, max_size=3), max_leaves=6)
trees = st.dictionaries(part, tree, min_size=1, max_size=3)


def built(names: dict[str, Any] | None) -> nn.Module:
    if names is None:
        return nn.Linear(3, 3)
    return nn.ModuleDict({name: built(inner) for name, inner in names.items()})


def leaves(names: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, inner in names.items():
        found += [prefix + name] if inner is None else leaves(inner, f"{prefix}{name}.")
    return found


def chosen(module: nn.Module, targets: Any, excluded: Any = ()) -> set[str] | None:
    try:
        return set(find_targets(module, targets, excluded))
    except TargetNotFoundError:
        return None


@few
@given(trees, st.lists(part, min_size=1, max_size=2), st.none() | part)
def test_names_mean_whole_parts_at_the_end_and_excluded_ones_all_that_is_inside(
    names: dict[str, Any], targets: list[str], excluded: str | None
) -> None:
    module, layers = built(names), [name.split(".") for name in leaves(names)]
    wanted = {".".join(parts) for parts in layers if parts[-1] in targets}
    each_matches = all(any(parts[-1] == target for parts in layers) for target in targets)
    assert chosen(module, targets) == (wanted if each_matches else None)
    assert chosen(module, "all-linear") == {".".join(parts) for parts in layers}
    pattern = rf".*({'|'.join(targets)})"
    assert chosen(module, pattern) == ({".".join(p) for p in layers if re.fullmatch(pattern, ".".join(p))} or None)
    if excluded is not None:
        inside = {".".join(parts) for parts in layers if excluded in parts}
        left = {".".join(parts) for parts in layers} - inside
        assert chosen(module, "all-linear", [excluded]) == (left if inside else None)


@settings(few, max_examples=25)
@given(trees, st.data())
def test_any_layers_start_with_nothing_changed_and_train_alone(names: dict[str, Any], draw: st.DataObject) -> None:
    targets = draw.draw(st.lists(st.sampled_from(leaves(names)), min_size=1, unique=True))
    module, x = built(names), torch.ones(2, 3)
    linear = {name: module.get_submodule(name) for name in leaves(names)}
    before = {name: layer(x) for name, layer in linear.items()}
    adapters = inject(module, LoRAConfig(r=1), targets)
    assert initialize(module, cache=False) == len(targets)
    assert set(adapters) == set(targets)
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.{factor}" for name in targets for factor in ("lora_A", "lora_B")}
    for name in linear:
        assert torch.equal(module.get_submodule(name)(x), before[name])
    with torch.no_grad():
        for layer in adapters.values():
            layer.lora_A.add_(1)
    changed = {name for name in linear if not torch.equal(module.get_submodule(name)(x), before[name])}
    assert changed == set(targets)
    with adapters_disabled(module):
        assert all(torch.equal(module.get_submodule(name)(x), before[name]) for name in linear)
