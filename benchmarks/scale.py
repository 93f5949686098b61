"""A plan on paper: memory and time of surgery, a step and a checkpoint, for up to a trillion parameters on 1,024 GPUs.

python benchmarks/scale.py                                            # publishes the tables of docs/scale.md
python benchmarks/scale.py path/to/config.json --device H200 --gpus 8,64 --batch_size 2 --length 4096

Nothing here is measured. Operations and bytes of a decoder layer are counted on its real code (counting.py), memory is
what ``preview`` estimates (models/memory.py), decompositions are counted as linalg/costs.py counts them, and rates are
those that vendors publish, times the efficiencies below.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import ROOT, publish, table
from counting import Layer, decoder_layer, seconds
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from milora_lightning import LoRAConfig, lora_layers
from milora_lightning.adapters.linear_layers import linear_shape
from milora_lightning.linalg import costs
from milora_lightning.models.activations import active_intermediate
from milora_lightning.models.memory import Estimate, estimate, planned_model
from milora_lightning.parallel.work import partition_by_cost

PAGE = ROOT / "docs" / "scale.md"


@dataclass(frozen=True)
class Device:
    """What a vendor publishes of a device, in operations and bytes per second and bytes.

    Attributes:
        half: bfloat16 products, dense, with float32 accumulation.
        single: float32.
        double: float64, of tensor cores where there are any.
        bandwidth: Of its memory.
        memory: Its size.
        link: To the other devices of its node, in one direction.
        network: To other nodes, its share.
        node: Devices in a node.
    """

    half: float
    single: float
    double: float
    bandwidth: float
    memory: float
    link: float
    network: float
    node: int = 8


# H100 SXM and H200: NVIDIA's data sheets (NVLink 900 GB/s both ways). Network: 8 ConnectX-7 of 400 Gb/s per DGX H100.
# RTX 4090: NVIDIA's "Ada GPU Architecture" whitepaper; PCIe 4.0 x16, one 100 Gb/s card for a node of 8.
DEVICES = {
    "H100": Device(989e12, 67e12, 67e12, 3.35e12, 80e9, 450e9, 50e9),
    "H200": Device(989e12, 67e12, 67e12, 4.8e12, 141e9, 450e9, 50e9),
    "4090": Device(165e12, 82.6e12, 1.29e12, 1.008e12, 24e9, 32e9, 1.56e9),
}

# Shares of the published rates that programs reach: assumptions. An eigensolver spends half of its operations in
# products with one vector, and launches a few small kernels for each column.
PRODUCTS, MEMORY, LINKS, EIGENPROBLEMS = 0.6, 0.8, 0.8, 0.1
LAUNCH = 5e-6  # seconds of the host for each operation
DISK = 2e9  # bytes per second that a node reads or writes: an assumption, for one NVMe disk or a shared file system

LLAMA: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
MODELS: dict[str, PretrainedConfig] = {
    "7B (Llama 2)": LlamaConfig(**LLAMA),
    "70B (Llama 2)": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "405B (Llama 3.1)": LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
    ),
    # The sizes of Kimi K2, in the layout of Qwen3-MoE.
    "1T mixture of experts": Qwen3MoeConfig(
        vocab_size=163840,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=64,
        num_key_value_heads=64,
        head_dim=112,
        num_experts=384,
        num_experts_per_tok=8,
    ),
}


@dataclass(frozen=True)
class Run:
    """A run: a model with adapters of all linear layers, and what each GPU gets of a batch."""

    config: PretrainedConfig
    r: int = 64
    batch_size: int = 4
    length: int = 2048
    checkpointing: bool = True

    @property
    def adapters(self) -> LoRAConfig:
        """The adapters: of a mixture of experts, those of all other layers."""
        experts = ["experts"] if getattr(self.config, "num_experts", None) else []
        return LoRAConfig(self.r, target_modules="all-linear", exclude_modules=experts)

    @cached_property
    def model(self) -> Any:
        """The model with its adapters, without values."""
        return planned_model(self.config, torch.bfloat16, self.adapters)

    @cached_property
    def layer(self) -> Layer:
        """What one of its decoder layers does, attention aside."""
        return decoder_layer(dense(self.config), LoRAConfig(self.r), self.batch_size, self.length)

    @property
    def tokens(self) -> int:
        """Tokens of a GPU in a step."""
        return self.batch_size * self.length


@dataclass(frozen=True)
class Plan:
    """What a run takes on some GPUs.

    Attributes:
        sharded: Whether weights are sharded (FSDP2), or every GPU has all (DDP).
        memory: The most bytes of a GPU, as ``preview`` estimates them.
        surgery: Seconds of surgery by what takes them.
        step: Seconds of a step by what takes them; they overlap, and the largest is the time.
        saved: Bytes of a checkpoint.
        loaded: Bytes of weights that a node reads.
    """

    sharded: bool
    memory: float
    surgery: dict[str, float]
    step: dict[str, float]
    saved: float
    loaded: float


def planned(run: Run, device: Device, gpus: int) -> Plan:
    """Plan a run; weights are sharded if they have to be."""
    whole, parts = memory(run, 1), memory(run, gpus)
    sharded = gpus > 1 and whole.peak > device.memory
    used = parts if sharded else whole
    weights, adapters, gradients, states = (part.size for part in whole.parts[:4])
    return Plan(
        sharded,
        used.peak,
        surgery(run, device, gpus, weights if sharded else 0),
        step(run, device, gpus, 2 * weights if sharded else 2 * gradients * (gpus > 1)),
        adapters + states,
        weights,
    )


def memory(run: Run, shards: int) -> Estimate:
    """Estimate the memory of a GPU, as ``preview`` does."""
    return estimate(
        run.model,
        run.config,
        run.batch_size,
        run.length,
        gradient_checkpointing=run.checkpointing,
        attention="flash_attention_2",
        device="cuda",
        shards=shards,
    )


def surgery(run: Run, device: Device, gpus: int, gathered: float) -> dict[str, float]:
    """Return the seconds of the rank with the most to do."""
    shapes = [linear_shape(layer.base_layer) for layer in lora_layers(run.model).values()]
    busy = [0.0] * gpus
    for shape, owner in zip(shapes, partition_by_cost(shapes, gpus), strict=True):
        busy[owner] += decomposition(device, shape, run.r)
    factors = 4 * sum(run.r * (rows + columns) for rows, columns in shapes)
    # A gathered weight leaves its shards once; factors reach every rank.
    moved = (gathered / gpus + factors) / speed(device, gpus) if gpus > 1 else 0.0
    return {"eigenproblems": max(busy), "links": moved}


def decomposition(device: Device, shape: tuple[int, int], r: int) -> float:
    """Return the seconds of one weight, in the way that takes least, as linalg/devices.py chooses it."""
    k, n = sorted(shape)
    rates = device.double * EIGENPROBLEMS, device.single * EIGENPROBLEMS
    return min(costs.in_double(k, n).seconds(*rates), costs.in_single(k, n, r).seconds(*rates))


def step(run: Run, device: Device, gpus: int, moved: float) -> dict[str, float]:
    """Return the seconds of a step, by what may take longest; they overlap."""
    config = dense(run.config)
    layers = config.num_hidden_layers
    forward, backward = run.layer
    operations = [*forward, *backward, *(forward if run.checkpointing else [])]
    rate, bandwidth = device.half * PRODUCTS, device.bandwidth * MEMORY
    head = 4 * run.tokens * config.vocab_size * config.hidden_size / rate  # logits, and the gradient of what gave them
    return {
        "arithmetic and memory": layers * (seconds(operations, rate, bandwidth) + attention(config, run) / rate) + head,
        "launches": layers * len(operations) * LAUNCH,
        "links": moved / speed(device, gpus) if gpus > 1 else 0.0,
    }


def attention(config: PretrainedConfig, run: Run) -> float:
    """Count the operations of a layer's causal attention: forward, once more if recomputed, and 2.5 times backward."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    forward = 2 * run.tokens * run.length * config.num_attention_heads * head_dim
    return forward * (3.5 + run.checkpointing)


def dense(config: PretrainedConfig) -> PretrainedConfig:
    """Return a dense model in which a token takes the operations that it takes in a mixture of experts."""
    if not getattr(config, "num_experts_per_tok", None):
        return config
    sizes = {name: getattr(config, name) for name in LlamaConfig().to_dict() if hasattr(config, name)}
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return LlamaConfig(**{name: sizes[name] for name in same}, intermediate_size=active_intermediate(config))


def speed(device: Device, gpus: int) -> float:
    """Return the bytes per second at which a GPU gathers what the others have: of its node, or of all nodes."""
    within = device.link * LINKS
    return within if gpus <= device.node else min(within, device.node * device.network * LINKS)


def cells(name: str, plan: Plan, run: Run, device: Device, gpus: int) -> list[str]:
    """Format a plan as a row."""
    slowest, time = max(plan.step.items(), key=lambda item: item[1])
    longest = max(plan.surgery, key=lambda part: plan.surgery[part])
    fits = plan.memory <= device.memory
    row = [name, str(gpus), "FSDP2" if plan.sharded else "DDP" if gpus > 1 else "one GPU"]
    row += [f"{plan.memory / 1e9:.0f} GB" if fits else f"**{plan.memory / 1e9:.0f} GB**"]
    row += [f"{duration(sum(plan.surgery.values()))} ({longest})"]
    if not fits:
        return [*row, "does not fit", "", ""]
    disk = f"{plan.saved / 1e9:.1f} GB in {duration(plan.saved / DISK)}, {duration(plan.loaded / DISK)}"
    return [*row, f"{duration(time)} ({slowest})", f"{gpus * run.tokens / time:,.0f}", disk]


def duration(time: float) -> str:
    """Format seconds.

    >>> duration(0.0421), duration(3.21), duration(200)
    ('0.04 s', '3.2 s', '3.3 min')
    """
    return f"{time:.2f} s" if time < 1 else f"{time:.1f} s" if time < 100 else f"{time / 60:.1f} min"


COLUMNS = [
    *("model", "GPUs", "strategy", "memory of a GPU", "surgery (what takes longest)", "step (bottleneck)", "tokens/s"),
    "checkpoint, base read by a node",
]


def tables(models: dict[str, Run], device: str, gpus: list[int]) -> str:
    """Return the table of some models on some numbers of GPUs."""
    rows = []
    for name, run in models.items():
        rows += [cells(name, planned(run, DEVICES[device], n), run, DEVICES[device], n) for n in gpus]
    return table(COLUMNS, rows)


def main() -> None:
    """Print the plan of a configuration, or publish those of the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", nargs="?", type=Path, help="a model's config.json; none publishes docs/scale.md")
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--gpus", default="1,8,64,1024")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--no_checkpointing", action="store_true")
    options = parser.parse_args()
    gpus = [int(number) for number in options.gpus.split(",")]
    how = (options.r, options.batch_size, options.length, not options.no_checkpointing)
    if options.config is not None:
        config = AutoConfig.from_pretrained(options.config.parent if options.config.is_file() else options.config)
        print(tables({options.config.name: Run(config, *how)}, options.device, gpus))
        return
    runs = {name: Run(config, *how) for name, config in MODELS.items()}
    text = tables(runs, "H100", gpus)
    large = {name: run for name, run in runs.items() if name.startswith(("405B", "1T"))}
    small = {name: run for name, run in runs.items() if name.startswith("7B")}
    text += f"\n\nH200, what an H100 cannot hold:\n\n{tables(large, 'H200', gpus[1:])}"
    text += f"\n\nRTX 4090:\n\n{tables(small, '4090', gpus[:2])}"
    publish("scale", text, PAGE, measured=False)


if __name__ == "__main__":
    main()
