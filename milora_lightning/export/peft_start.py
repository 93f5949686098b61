"""Applying this package's starts to the LoRA layers of a model from PEFT's ``get_peft_model``.

PEFT's layer computes W x + s B A x and cannot subtract s B₀A₀. But s (B A − B₀A₀) is the product of two factors of
twice the rank, s [B − B₀, B₀] [A; A − A₀], which is exactly zero at the start. So a layer of rank r becomes one of rank
2r, whose two factors are computed from A, B, A₀ and B₀. W is not modified; PEFT's code computes, merges and saves; and
the saved adapter opens as a plain one of rank 2r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milora_lightning.adapters.initialization import initialize
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_linear, largest_rank
from milora_lightning.export.peft_folder import PLAIN_STARTS
from milora_lightning.export.peft_format import PEFT_PREFIX, deviations, most_common, whole
from milora_lightning.starts import find_start
from milora_lightning.utils.derived_class import Derived, derive
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.precision import without_rounding

STARTED = "started"
"""Attribute of a PEFT layer's base layer with A, B, A₀ and B₀. It is inside the base layer and without "lora_" in its
name so that no version of PEFT saves it as a part of the adapter."""


class StartedFactors(nn.Module):
    """A and B, which train, and their initial values; in float32 at least, whatever the model is cast to.

    Half precision would lose steps that are small compared with the factors.

    Args:
        A: Initial factor (r, in).
        B: Initial factor (out, r).
        frozen: Name of the factor that keeps its initial value, ``"lora_A"`` or ``"lora_B"``, or None.
    """

    def __init__(self, A: Tensor, B: Tensor, frozen: str | None = None) -> None:
        super().__init__()
        self.frozen = frozen
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.train_factor("A")
        self.train_factor("B")
        # Parameters, not buffers: DDP would broadcast buffers at every step.
        self.initial_A, self.initial_B = (nn.Parameter(x.clone(), requires_grad=False) for x in (A, B))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StartedFactors:
        super()._apply(without_rounding(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def train_factor(self, factor: str, trains: bool = True) -> None:
        """Make a factor trainable, unless its start freezes it, or freeze it."""
        getattr(self, factor).requires_grad_(trains and self.frozen != f"lora_{factor}")

    def stacked(self, factor: str) -> Tensor:
        """Return [A; A − A₀] (2r, in), or [B − B₀, B₀] (out, 2r)."""
        if factor == "A":
            return torch.cat([self.A, self.A - self.initial_A])
        return torch.cat([self.B - self.initial_B, self.initial_B], dim=1)


class StackedLinear(nn.Module):
    """A replacement of one of PEFT's two linear layers, without parameters.

    Args:
        factors: The factors that its weight is computed from.
        factor: ``"A"`` or ``"B"``.
    """

    bias = None

    def __init__(self, factors: StartedFactors, factor: str) -> None:
        super().__init__()
        # In a tuple, so as not to be registered: it belongs to PEFT's layer.
        self._factors, self._factor = (factors,), factor
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        """The weight (out, in)."""
        return self._factors[0].stacked(self._factor)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the product."""
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *_: Any) -> None:
        """Load nothing: the factors are loaded instead."""


class StartedLayer(Derived):
    """Mixin of PEFT's layers with such an adapter: the factors are removed together with the adapter."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, with the update merged if requested."""
        layer = cast(Any, self)
        if merge:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = cast(nn.Module, layer.get_base_layer())
        base._modules.pop(STARTED, None)
        return base

    def set_adapter(self, adapter_names: str | list[str], **options: Any) -> None:
        """Activate adapters, and make their factors trainable and no others."""
        super().set_adapter(adapter_names, **options)  # type: ignore[misc]
        active = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        factors = cast(Any, self).get_base_layer()._modules.get(STARTED)
        for factor in "AB" if isinstance(factors, StartedFactors) else "":
            factors.train_factor(factor, _started_adapter(self) in active and not options.get("inference_mode"))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        # An empty module remains, because PEFT 0.18 looks up all modules from before.
        if _started_adapter(self) is None:
            cast(Any, self).get_base_layer()._modules[STARTED] = nn.Module()


def _started_adapter(layer: Any) -> str | None:
    return next((name for name, A in layer.lora_A.items() if isinstance(A, StackedLinear)), None)


def _check_state(layer: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Refuse an adapter in PEFT's saved form, from which A and B cannot be recovered; other adapters may have it."""
    key = f"{prefix}lora_A.{_started_adapter(layer)}.weight"
    if key in state and f"{prefix}base_layer.{STARTED}.A" not in state:
        args[-1].append(f"{key} is of a saved adapter: open it in a model without initialize_peft.")


def initialize_peft(
    model: nn.Module, init: str = "milora", seed: int = 0, device: torch.device | None = None, cache: bool = True
) -> int:
    """Apply one of this package's starts to the LoRA layers of a PEFT model, as returned by ``get_peft_model``.

    The base weights are not modified, and the model still computes the same function. If B₀A₀ is zero
    (``init="lora"``), PEFT's factors are filled in place. For all other starts, each layer gets twice its rank, and its
    factors are computed from A and B, which train as with :class:`milora_lightning.MiLoRAInit`, and from their initial
    values. ``save_pretrained`` writes adapters that open in a fresh PEFT model; ``merge_and_unload`` and
    ``disable_adapter`` work as well. Call this before creating the optimizer, because the parameters are new, and
    before loading a checkpoint. Weight decay must be zero except with ``init="lora"``: it would remove B₀A₀ from the
    model.

    Args:
        model: A PEFT model, or a module with one inside, with new adapters for linear layers; changed in place.
        init: The start; see :class:`milora_lightning.LoRAConfig`.
        seed: Seed of random starts.
        device: Device for the decompositions; by default the weights'.
        cache: Whether to read decompositions from the user's cache folder and write new ones to it.

    Returns:
        The number of layers.

    Raises:
        ValueError: If there are no such layers, or they have been trained or are of an unsupported kind. Nothing is
            changed then.
    """
    layers, start, holder = _layers(model, init), find_start(init), nn.Module()
    for name, (layer, adapter) in layers.items():
        r = layer.r[adapter]
        plain_name = name.replace(PEFT_PREFIX, "", 1)  # the seed of random starts
        holder._modules[plain_name] = LoRALinear(layer.get_base_layer(), r, layer.scaling[adapter] * r, init=init)
    initialize(holder, seed, device=device, cache=cache)
    for ours, (layer, adapter) in zip(holder.children(), layers.values(), strict=True):
        _fill(layer, adapter, cast(LoRALinear, ours))
    if not start.zero_product:
        _double_ranks(model, layers)
    return len(layers)


@torch.no_grad()
def _fill(layer: Any, adapter: str, ours: LoRALinear) -> None:
    linears = layer.lora_A[adapter], layer.lora_B[adapter]
    pairs = zip((ours.lora_A, ours.lora_B), (linear.weight for linear in linears), strict=True)
    A, B = (x.detach().to(like.device, torch.promote_types(x.dtype, like.dtype)) for x, like in pairs)
    if ours.initial_A is None:
        for linear, value, factor in zip(linears, (A, B), ("lora_A", "lora_B"), strict=True):
            linear.weight.copy_(value)
            linear.weight.requires_grad_(ours.frozen != factor)
        return
    factors = StartedFactors(A, B, ours.frozen)
    layer.get_base_layer().add_module(STARTED, factors)
    derive(layer, StartedLayer)
    layer.register_load_state_dict_pre_hook(_check_state)
    layer.lora_A[adapter], layer.lora_B[adapter] = StackedLinear(factors, "A"), StackedLinear(factors, "B")


def _double_ranks(model: nn.Module, layers: Mapping[str, tuple[Any, str]]) -> None:
    """Double the ranks in layers and in PEFT's configuration, leaving the scales unchanged."""
    for layer, adapter in layers.values():
        layer.r[adapter] *= 2
        layer.lora_alpha[adapter] = whole(layer.scaling[adapter] * layer.r[adapter])
        layer.use_rslora[adapter] = False
    for adapter, config in _configs(model).items():
        adapted = {name.rpartition(PEFT_PREFIX)[2]: layer for name, (layer, of) in layers.items() if of == adapter}
        ranks = {name: layer.r[adapter] for name, layer in adapted.items()}
        alphas = {name: layer.lora_alpha[adapter] for name, layer in adapted.items()}
        config.r, config.lora_alpha = most_common(ranks), most_common(alphas)
        config.rank_pattern, config.alpha_pattern = deviations(ranks, config.r), deviations(alphas, config.lora_alpha)
        config.use_rslora, config.init_lora_weights = False, True


def _configs(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for child in model.modules():
        found |= getattr(child, "peft_config", None) or {}
    return found


def _layers(model: nn.Module, init: str) -> dict[str, tuple[Any, str]]:
    """Return PEFT's layers and the names of their adapters, by the layers' names.

    Raises:
        ValueError: If one of them is not supported, or there are none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if find_start(init).needs:
        raise InvalidInputError(
            f"init={init!r} is computed from data, which initialize_peft does not take: leave get_peft_model out, and "
            "use MiLoRAInit, or take another init."
        )
    layers: dict[str, Any] = {n: child for n, child in model.named_modules() if isinstance(child, BaseTunerLayer)}
    if not layers:
        raise InvalidInputError(
            "The model has no PEFT layers to fill: call get_peft_model first, or use MiLoRAInit, which needs no PEFT."
        )
    for adapter, config in _configs(model).items():
        begun = getattr(config, "init_lora_weights", True)
        if isinstance(begun, str) and begun not in PLAIN_STARTS:
            raise InvalidInputError(
                f"PEFT has changed the base weights for init_lora_weights={begun!r} of adapter {adapter!r}: load the "
                "model anew, and leave init_lora_weights out of LoraConfig."
            )
    found = {}
    for name, layer in layers.items():
        if said := _objection(layer, init):
            raise InvalidInputError(
                f"The PEFT layer {name!r} {said}. Leave get_peft_model out, and use MiLoRAInit, whose adapters "
                "export_peft writes for PEFT."
            )
        found[name] = layer, next(iter(layer.r))
    return found


@torch.no_grad()
def _objection(layer: Any, init: str) -> str | None:
    """Return the reason why a PEFT layer is not supported; None if it is."""
    adapters = list(getattr(layer, "r", ()))
    if len(adapters) != 1:
        return f"has {len(adapters)} LoRA adapters, and one is to be filled"
    A, B = (getattr(layer, f"lora_{factor}")._modules.get(adapters[0]) for factor in "AB")
    if isinstance(A, StackedLinear):
        return "has been filled already"
    plain = type(A) is nn.Linear and type(B) is nn.Linear and is_linear(layer.get_base_layer())
    if not plain or isinstance(layer, nn.MultiheadAttention) or hasattr(layer, "parameter_name"):
        return f"({type(layer).__name__}) is not that of a linear layer"
    if adapters[0] in getattr(layer, "lora_variant", {}) or B.bias is not None:
        return "computes more than W x + s B A x (DoRA, a bias, or another variant)"
    if layer.merged:
        return "is merged"
    if bool(B.weight.any()) and bool((B.weight @ A.weight).abs().max() > 1e-5):  # nearly zero for the orthogonal start
        return "has been trained, and filling it would lose that"
    r, most = layer.r[adapters[0]], largest_rank(layer.get_base_layer())
    return (
        f"has r={r}, and its weight has {most} singular values" if r > most and not find_start(init).any_rank else None
    )
