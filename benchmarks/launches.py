"""What adapters ask of a GPU beside the frozen model and PEFT: launches, bytes, memory kept for backward, host waits.

Everything is counted on the meta device (``cost.py``), without a GPU: one layer forward and backward, and what
autograd keeps of the blocks of a 7B Llama. Attention keeps what FlashAttention does.

python benchmarks/launches.py   # a minute or two
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from common import RESULTS, publish, table
from cost import ATTENTION, Cost, kept_for_backward
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from milora_lightning import LoRAConfig, lora_layers
from milora_lightning.adapters.surgery import inject
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.positions import found_before_transfer, known_after_transfer
from milora_lightning.models.recompute import recompute_layers

PAGE = RESULTS.parent / "launches.md"
IN, OUT, R, ROWS, LENGTH = 4096, 4096, 64, 16, 512
DROPOUTS = (0.0, 0.05)
SMALL, TOKENS, ROUNDS = 768, 2048, 9  # for a processor
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
BLOCKS = 32
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}

Adapt = Callable[[nn.Module, Sequence[str], float], nn.Module]


def frozen(model: nn.Module, targets: Sequence[str], dropout: float) -> nn.Module:
    """Leave a model without adapters."""
    return model.requires_grad_(False)


def ours(model: nn.Module, targets: Sequence[str], dropout: float, init: Any = "milora") -> nn.Module:
    """Put this package's adapters on a model."""
    inject(model, LoRAConfig(r=R, lora_dropout=dropout, target_modules=targets, init=init))
    for layer in lora_layers(model).values():
        layer.initialized = True
    return model


def ours_lora(model: nn.Module, targets: Sequence[str], dropout: float) -> nn.Module:
    """Put this package's adapters on a model, with LoRA's own start."""
    return ours(model, targets, dropout, "lora")


def peft(model: nn.Module, targets: Sequence[str], dropout: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Put PEFT's adapters on a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=R, lora_alpha=R, lora_dropout=dropout, target_modules=list(targets))
        model = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if type(module) is nn.Dropout:  # one operation on GPUs, and three on the meta device
            module.forward = partial(_dropout, module)
    return model


def _dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    return torch.native_dropout(x, module.p, module.training)[0]


def peft_half(model: nn.Module, targets: Sequence[str], dropout: float) -> nn.Module:
    """Put PEFT's adapters in bfloat16 on a model."""
    return peft(model, targets, dropout, torch.bfloat16)


CONTENDERS: dict[str, Adapt] = {
    "frozen": frozen,
    "ours": ours,
    "ours, `init: lora`": ours_lora,
    "PEFT, float32 adapters": peft,
    "PEFT, bfloat16 adapters": peft_half,
}


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, features: int = IN, out: int = OUT) -> None:
        super().__init__()
        self.up_proj = nn.Linear(features, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        result: Tensor = self.up_proj(x)
        return result


@cache
def cost_of_layer(adapt: Adapt, dropout: float) -> Cost:
    """Count one layer's forward and backward."""
    with torch.device("meta"):
        model = adapt(OneLayer().bfloat16(), ["up_proj"], dropout).train()
        x = torch.empty(ROWS, LENGTH, IN, dtype=torch.bfloat16).requires_grad_()
        with Cost() as cost:
            y = model(x)
        direction = torch.empty_like(y)
        with cost:
            y.backward(direction)
    return cost


def llama(adapt: Adapt, dropout: float, blocks: int) -> tuple[Any, Tensor]:
    """Build some blocks of a 7B Llama with adapters, and a batch for them."""
    config = LlamaConfig(**LLAMA_7B, num_hidden_layers=blocks)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
        model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())
        return adapt(model, TARGETS, dropout).train(), torch.zeros(ROWS, LENGTH, dtype=torch.int64)


def last_logits(model: Any, ids: Tensor, share: float = 0.0) -> Tensor:
    """Run a model whose blocks may be recomputed."""
    if share:
        recompute_layers(model, share)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits


@cache
def kept_by_model(adapt: Adapt, dropout: float, share: float = 0.0) -> int:
    """Count what autograd keeps of all blocks of a 7B Llama."""
    kept = []
    for blocks in (1, 2):
        model, ids = llama(adapt, dropout, blocks)
        known = [*model.parameters(), *model.buffers(), ids]
        kept.append(kept_for_backward(partial(last_logits, model, ids, share), known))
    return BLOCKS * (kept[1] - kept[0])


@cache
def products_of_model(share: float) -> int:
    """Count the floating-point operations of a step's matrix products, in all blocks of a 7B Llama."""
    found = []
    for blocks in (1, 2):
        model, ids = llama(ours, 0.05, blocks)
        with FlopCounterMode(display=False) as counter:
            last_logits(model, ids, share).sum().backward()
        found.append(counter.get_total_flops())
    return BLOCKS * (found[1] - found[0])


def waits_of_step() -> Cost:
    """Count the waits of the loss and its gradient, on a small model of this package and a batch on its way to it."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=2))
    ours(model, TARGETS, 0.05).train()
    ids = torch.randint(1, 128, (2, 16))
    batch = known_after_transfer(found_before_transfer({"input_ids": ids, "labels": ids.clone()}))
    with Cost() as cost:
        causal_lm_loss(model, batch["input_ids"], batch["labels"]).backward()
    return cost


def gigabytes(count: float) -> str:
    """Write a number of bytes."""
    return f"{count / 1e9:.2f} GB"


def beside_peers() -> None:
    """Publish what adapters ask for, beside the frozen model and PEFT."""
    rows = []
    for name, adapt in CONTENDERS.items():
        costs = [cost_of_layer(adapt, p) for p in DROPOUTS]
        launches = " / ".join(str(cost.launches) for cost in costs)
        moved = " / ".join(gigabytes(cost.bytes) for cost in costs)
        kept = " / ".join(gigabytes(kept_by_model(adapt, p)) for p in DROPOUTS)
        rows.append([name, launches, moved, kept])
    columns = ["dropout 0 / 0.05", "launches", "bytes moved", "kept for backward, 7B"]
    waits = waits_of_step().waits
    listed = ", ".join(f"{count} × `{name}`" for name, count in waits.items())
    note = (
        f"Launches and bytes: one layer {IN}→{OUT}, forward and backward, r = {R}, {ROWS * LENGTH:,} tokens, bfloat16. "
        f"Kept: all {BLOCKS} blocks of a Llama of 7B, {ROWS} × {LENGTH} tokens, adapters on "
        f"{', '.join(f'`{name}`' for name in TARGETS)}. "
        f"Waits of the host for the GPU in a step's loss and gradient: {waits.total()}"
        + (f" ({listed})." if waits else ".")
    )
    publish("launches", f"{table(columns, rows)}\n\n{note}", PAGE)


def recomputing() -> None:
    """Publish what recomputation saves and costs."""
    kept, products = (
        [count(share) for share in (0, 1)] for count in (partial(kept_by_model, ours, 0.05), products_of_model)
    )
    rows = []
    for share in (0.0, 0.25, 0.5, 1.0):
        memory, work = ((1 - share) * none + share * whole for none, whole in (kept, products))
        rows.append([f"`{share:g}`", gigabytes(memory), f"{work / products[0] - 1:+.0%}"])
    columns = ["`model.gradient_checkpointing`", "kept for backward, 7B", "operations of matrix products"]
    publish("launches_recompute", table(columns, rows), PAGE)


def trend() -> None:
    """Publish whether counted operations and bytes tell a CPU's time, for the same layers on one core, in float32."""
    torch.set_num_threads(1)
    seconds: dict[tuple[str, float], list[float]] = {}
    counted: dict[tuple[str, float], tuple[float, float]] = {}
    contenders = [(name, adapt) for name, adapt in CONTENDERS.items() if adapt is not peft_half]  # all in one dtype
    runs = {(name, p): _run_on_cpu(adapt, p) for name, adapt in contenders for p in DROPOUTS}
    for key, run in runs.items():
        with (
            FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_operations}) as counter,
            Cost() as cost,
        ):
            run()
        counted[key] = counter.get_total_flops() / 1e9, cost.bytes / 1e9
    for _ in range(ROUNDS):
        for key, run in runs.items():
            started = time.process_time()
            run()
            seconds.setdefault(key, []).append(time.process_time() - started)
    found = torch.tensor([statistics.median(values) for values in seconds.values()])
    predictors = torch.tensor([counted[key] for key in seconds])
    per_unit = torch.linalg.lstsq(predictors, found[:, None]).solution[:, 0]
    predicted = predictors @ per_unit
    rows = [
        [f"{name}, dropout {p:g}", f"{flops:.1f}", f"{moved:.2f} GB", f"{1e3 * told:.0f} ms", f"{1e3 * real:.0f} ms"]
        for ((name, p), (flops, moved)), told, real in zip(
            counted.items(), predicted.tolist(), found.tolist(), strict=True
        )
    ]
    columns = ["on one core", "10⁹ operations of products", "bytes moved", "predicted", "measured"]
    correlation = torch.corrcoef(torch.stack([predicted, found]))[0, 1]
    note = (
        f"One layer {SMALL}→{SMALL}, r = {R}, {TOKENS:,} tokens, float32, medians of {ROUNDS} alternating rounds of "
        f"CPU time. Predicted: {1e3 * per_unit[0]:.0f} ms for 10⁹ operations and {1e3 * per_unit[1]:.0f} ms for a GB, "
        f"fitted to all of them; correlation {correlation:.3f}."
    )
    publish("launches_trend", f"{table(columns, rows)}\n\n{note}", PAGE)


def _addmm_operations(y: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _run_on_cpu(adapt: Adapt, dropout: float) -> Callable[[], None]:
    model = adapt(OneLayer(SMALL, SMALL), ["up_proj"], dropout).train()
    x, direction = torch.randn(TOKENS, SMALL).requires_grad_(), torch.randn(TOKENS, SMALL)

    def run() -> None:
        model(x).backward(direction)
        model.zero_grad()
        x.grad = None

    return run


if __name__ == "__main__":
    beside_peers()
    recomputing()
    trend()
