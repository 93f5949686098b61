"""Adapters of experts: 3-D parameters that stack one matrix for each expert of a mixture.

transformers 5 keeps all experts of a layer in parameters (experts, out, in), as ``gate_up_proj`` and ``down_proj``.
Each matrix in such a stack has separate factors, which are stacked as well: A (experts, r, in) and B (experts, out, r).
The module that holds the parameters is wrapped. While it computes, a :class:`LowRankSum` replaces each of them, so that
the module's code multiplies the tokens routed to an expert by W + s (B A − B₀A₀), however it does that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from milora_lightning.adapters.added_update import AddedUpdate
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.held_weight import HeldWeight
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_adaptable, is_convolution, is_plain, scale_name
from milora_lightning.adapters.low_rank_sum import LowRankSum
from milora_lightning.adapters.merged_product import MergedFactors, can_merge
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import unwrapped_name

INPUT_FIRST = {"Llama4TextExperts"}
"""Classes whose matrices are (in, out) although they lack the attribute ``is_transposed``."""

ROUTERS = {"router", "gate", "gating", "classifier", "shared_expert_gate"}
"""Names of routers, the layers that decide which experts process a token, and of the modules around them."""

IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm")
"""Transformers' implementations of experts that use torch's products."""


class StackedWeight(HeldWeight):
    """A 3-D parameter of a module as an adapter's base layer.

    Args:
        experts: The module that holds the parameter: (experts, out, in), or (experts, in, out) if ``transposed``.
        parameter: The parameter's name there.
    """

    def __init__(self, experts: nn.Module, parameter: str) -> None:
        super().__init__(experts, parameter)
        matrices, *shape = self.weight.shape
        self.matrices = matrices
        kind = type(experts)
        self.transposed = bool(getattr(experts, "is_transposed", any(c.__name__ in INPUT_FIRST for c in kind.__mro__)))
        self.out_features, self.in_features = reversed(shape) if self.transposed else shape

    @property
    def experts(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.holder


def is_stack(layer: object) -> TypeGuard[StackedWeight]:
    """Whether this is a 3-D parameter that acts as a layer."""
    return isinstance(layer, StackedWeight)


class LoRAExperts(AddedUpdate):
    """A low-rank update of each matrix in a stack: a :class:`LoRALinear` for each expert.

    Args:
        base_layer: The stack.
        r: Rank of each expert's factors.
        **options: The other arguments of :class:`LoRALinear`.

    Attributes:
        lora_A: Trainable factors (experts, r, in).
        lora_B: Trainable factors (experts, out, r).

    Raises:
        TypeError: If ``base_layer`` is not a stack.
    """

    fits = staticmethod(is_stack)
    _ADAPTS = "stacked weights"
    _kept: MergedFactors | None = None

    def __init__(self, base_layer: nn.Module, r: int, *options: Any, **named: Any) -> None:
        super().__init__(base_layer, r, *options, **named)
        self.transposed = self.stack.transposed
        if self.lora_dropout and self.dropout_on == "product":
            raise InvalidInputError(
                "dropout_on='product' is not possible for adapters of experts: use dropout_on='update', or leave the "
                "experts out (exclude_modules)."
            )

    @property
    def stack(self) -> StackedWeight:
        """The base layer."""
        return cast(StackedWeight, self.base_layer)

    @property
    def matrices(self) -> int:
        """The number of matrices."""
        return len(self.lora_A)

    def forward(self, input: Tensor) -> Tensor:
        """Raise an error: only the experts' module can compute with this adapter."""
        raise NotImplementedError("An adapter of experts has no input of its own: call the module that holds it.")

    def update(self, x: Tensor) -> Tensor:
        """Compute each expert's s (B A − B₀A₀) x, of shape (experts, tokens, out), for x (tokens, in)."""
        A, B = stack_factors(*self.factors, self.scaling, x.dtype)
        return x @ A.mT @ B.mT

    def operand(self) -> LowRankSum:
        """Return W + s (B A − B₀A₀) of all experts in the layout of W, as an operand of products."""
        self._check_can_train()
        weight, kept = self.base_layer.weight, None if torch.is_grad_enabled() else self._kept
        if kept is not None and not kept.is_of(weight, self.factors):
            self.merge()
            kept = self._kept
        A, B = stack_factors(*self.factors, self.scaling, weight.dtype) if kept is None else kept.stacks
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return LowRankSum(weight, left, right, self._dropout)

    def merge(self) -> None:
        """Stack and cast the factors once. For generation, where this would be repeated for all experts at each token.

        Outputs stay the same bit for bit. The sums with the weights are not stored, as they would take the memory of a
        second model.
        """
        weight = self.base_layer.weight
        self._kept = MergedFactors(weight, self.factors, self.scaling) if can_merge(weight, self.factors) else None

    def unmerge(self) -> None:
        """Discard the result of :meth:`merge`."""
        self._kept = None

    @property
    def merged(self) -> bool:
        """Whether calls without gradients use the result of :meth:`merge`."""
        return self._kept is not None

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Convert a stack to matrices (experts, out, in)."""
        return weight.mT if self.transposed else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Convert matrices (experts, out, in) to the stack's layout."""
        return matrix.mT if self.transposed else matrix


class AdaptedExperts(nn.Module):
    """A module with stacked weights, and their adapters under the parameters' names.

    Args:
        base_layer: The module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.train(base_layer.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, with its stacked weights replaced by their sums with the updates."""
        with self._updated():
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _updated(self) -> Iterator[None]:
        adapters = {n: m for n, m in self._modules.items() if isinstance(m, LoRAExperts) and m.enabled}
        found = vars(self.base_layer)  # takes precedence over registered parameters
        try:
            found.update({name: adapter.operand() for name, adapter in adapters.items()})
            yield
        finally:
            for name in adapters:
                found.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)


def stacked_weights(module: nn.Module) -> dict[str, StackedWeight]:
    """Return the stacks in a module that have no adapters yet, by their parameters' names."""
    wrappers = {child.base_layer: child for child in module.modules() if isinstance(child, AdaptedExperts)}
    found = {}
    for wrapped_name, child in module.named_modules():
        adapted = wrappers[child]._modules if child in wrappers else {}
        name = unwrapped_name(wrapped_name).removesuffix(".base_layer" if child in wrappers else "")
        for key, parameter in child._parameters.items() if name else ():
            matrices = parameter is not None and parameter.ndim == 3 and _holds_matrices(child, key)
            if matrices and key not in adapted:
                found[f"{name}.{key}"] = StackedWeight(child, key)
    return found


def _holds_matrices(owner: nn.Module, key: str) -> bool:
    others = isinstance(owner, LoRALinear) or is_convolution(owner)
    return not (others or type(owner).__module__.startswith("torch.nn.") or key.endswith("bias"))


def objection_to(stack: StackedWeight) -> str | None:
    """Return the reason why a stack cannot have adapters, or None if it can."""
    experts = stack.experts
    if not is_plain(stack.weight) or scale_name(experts) is not None:
        return "holds quantized codes (load it with dequantize=True in the model's quantization_config)"
    if getattr(experts, "_is_expert_parallel", False):
        return "is shared out among ranks (expert parallelism)"
    how = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if how not in IMPLEMENTATIONS:
        return f"is computed by experts_implementation={how!r} and not by torch's products, as 'grouped_mm' would"
    if any(is_adaptable(child) for child in experts.modules()):
        return "is a parameter beside other layers in one module"
    return None


def is_of_experts(name: str, stack: StackedWeight) -> bool:
    """Whether a stack holds the experts of a mixture, judging by its name or class.

    Args:
        name: The stack's name in the model.
        stack: The stack.
    """
    return len(stack.weight) > 1 and ("expert" in name or "Experts" in type(stack.experts).__name__)


def routers(layers: Iterable[str], stacks: Iterable[str]) -> set[str]:
    """Return the names of routers: linear layers with a router's name in a module that also holds experts.

    >>> sorted(routers(["mlp.gate", "mlp.shared.gate_proj", "gate"], ["mlp.experts.up_proj"]))
    ['mlp.gate']
    """
    blocks = tuple({f"{stack.rpartition('.')[0].rpartition('.')[0]}." for stack in stacks} - {"."})
    return {name for name in layers if name.startswith(blocks) and ROUTERS & set(name.split("."))} if blocks else set()


def wrappers_of(module: nn.Module, adapters: Mapping[StackedWeight, LoRALinear]) -> dict[nn.Module, nn.Module]:
    """Wrap the modules that hold the stacks, together with the adapters.

    Args:
        module: The model, which may have such wrappers already.
        adapters: The adapters by their stacks.

    Returns:
        The new wrappers, by the modules that they wrap.
    """
    wrappers: dict[nn.Module, AdaptedExperts] = {
        child.base_layer: child for child in module.modules() if isinstance(child, AdaptedExperts)
    }
    fresh: dict[nn.Module, nn.Module] = {}
    for stack, adapter in adapters.items():
        if stack.experts not in wrappers:
            wrappers[stack.experts] = fresh[stack.experts] = AdaptedExperts(stack.experts)
        wrappers[stack.experts]._modules[stack.parameter] = adapter
    return fresh
