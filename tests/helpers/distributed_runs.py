"""Runs that test_distributed.py makes on one process and on two; on two GPUs as a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, TensorDataset

import helpers.environment  # noqa: F401 (first)
from helpers.expert_runs import expert_runs
from helpers.models import quiet_trainer, tiny_model
from helpers.modules import data, module
from helpers.sharding_runs import sharding_runs
from milora_lightning import (
    ForgettingMonitor,
    LoRAConfig,
    MiLoRAInit,
    MiLoRAModelParallelStrategy,
    PrincipalProjection,
    UpdateMonitor,
    inject,
    lora_layers,
)
from milora_lightning.adapters import initialization
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.cli.main import main
from milora_lightning.parallel.dtensor import full_tensor
from milora_lightning.parallel.work import cost
from milora_lightning.strategies.fsdp import _kept_tensors


def forgetting(folder: Path) -> ForgettingMonitor:
    """Measure on 3 batches, of 2, 2 and 1 blocks: the second rank has one less than the first."""
    text = str(folder / "examples.jsonl")
    return ForgettingMonitor(text, "instruction", block_length=16, max_tokens=16 * 5, batch_size=2)


def updates() -> UpdateMonitor:
    """Measure on the first two batches of one process, or the first of each of two."""
    return UpdateMonitor(2 // int(os.environ.get("WORLD_SIZE", "1")))


STEPS = 4
EXPERT_KINDS = ("ddp", "fsdp2-folder", "fsdp1")
ORIGINS = ("single", "fsdp2", "fsdp2-folder")
RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # the strategy, and what else is set, also on one process
    "ddp": ("ddp", {}),
    "ddp-lora": ("ddp", {"adapter": {"init": "lora"}, "accumulate_grad_batches": 2}),  # of 3 an epoch: 2, then 1
    "ddp-strict": ("ddp", {"callbacks": lambda folder: [PrincipalProjection(8), forgetting(folder), updates()]}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2-folder": ("fsdp2-folder", {}),
    "fsdp2-random": (
        "fsdp2",
        {"adapter": {"init": "random", "decay_to_start": 1.0}, "module": {"loraplus_lr_ratio": 4.0}},
    ),
    "fsdp2-mica": ("fsdp2", {"adapter": {"init": "mica", "decay_to_start": 1.0}}),
    "fsdp1": ("fsdp1", {}),
    "fsdp2-rich": ("fsdp2", {"accumulate_grad_batches": 2, "module": {"gradient_checkpointing": True}}),
    "fsdp2-saved": ("fsdp2", {"adapter": {"modules_to_save": ["norm", "lm_head"]}}),
    "fsdp2-forgetting": ("fsdp2", {"callbacks": lambda folder: [forgetting(folder), updates()]}),
    "fsdp2-whole": ("fsdp2", {"model": "gpt2"}),
    "ddp-packed": ("ddp", {"data": {"packing": True}}),
    "ddp-shared": ("ddp", {"data": {"global_batch_size": 8}}),  # in two batches of each device, as on one
    "fsdp2-packed": ("fsdp2", {"data": {"packing": True}}),
    "ddp-by-example": (
        "ddp",
        {"accumulate_grad_batches": 2, "module": {"loss_agg_mode": "seq-mean-token-mean"}},
    ),
}


STRATEGIES: dict[str, dict[str, Any]] = {
    "offloaded": {"cpu_offload": True, "reshard_after_forward": True, "activation_checkpointing": 2},
    "replicated": {"data_parallel_replicate_size": 2, "activation_checkpointing": "selective"},
    "tensor": {"data_parallel_size": 1, "tensor_parallel_size": 2, "activation_checkpointing": "full"},
}
"""Options of our strategy for FSDP2, by the names of runs."""
RUNS |= {name: (name, {}) for name in STRATEGIES}

spent: list[int] = []
"""What the decompositions of this process have cost since it was last emptied."""


def counted(weight: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    spent.append(cost(weight.shape))
    return initial_factors(weight, *args)


class Record(Callback):
    """Keeps the losses and norms of all steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        if "grad_norm" in trainer.callback_metrics:  # not before the first optimizer step
            self.norms.append(trainer.callback_metrics["grad_norm"].item())


class FSDP1OnCPU(FSDPStrategy):
    """FSDP1 as Lightning sets it up, but for the device, of which Lightning passes on only a GPU's index."""

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        options = {"mixed_precision": self.mixed_precision_config, "sharding_strategy": self.sharding_strategy}
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options, **self.kwargs)


def strategy(name: str, devices: int = 2) -> Any:
    if name == "fsdp1":
        return FSDP1OnCPU()
    if name in STRATEGIES:
        return MiLoRAModelParallelStrategy(**STRATEGIES[name])
    if name.startswith("fsdp2"):
        return ModelParallelStrategy(devices, 1, save_distributed_checkpoint=name == "fsdp2-folder")
    return name


def adapters_of(trainer: Trainer) -> dict[str, Any]:
    if not isinstance(trainer.strategy, FSDPStrategy):
        return trainer.lightning_module.state_dict()
    tensors = (dict(unit) for unit in _kept_tensors(trainer.strategy))
    return {name: tensor.detach().clone() for unit in tensors for name, tensor in unit.items()}


def fit(
    folder: Path, name: str, kind: str = "auto", model: str = "llama", devices: int | None = None, **options: Any
) -> dict[str, Any]:
    """Train with a global batch of 4, saving in the middle; return what this rank has at the end."""
    devices = devices or (1 if kind == "auto" else 2)
    shares = 1 if kind == "tensor" else devices  # of the global batch
    resume, adapter, lm_options, rows = (
        options.pop(key, None) or {} for key in ("resume", "adapter", "module", "data")
    )
    more = options.pop("callbacks", lambda folder: [])(folder)
    record = Record()
    spent[:] = []
    saving = ModelCheckpoint(folder / name, "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1)
    settings = {"max_steps": STEPS, "max_epochs": 9, "gradient_clip_val": 0.01, "enable_checkpointing": True}
    trainer = quiet_trainer(
        folder,
        strategy=strategy(kind, devices),
        devices=devices,
        callbacks=[MiLoRAInit(**{"r": 4, "seed": 5, **adapter}), *more, saving, record],
        **{**settings, **options},
    )
    torch.manual_seed(100 + trainer.global_rank)  # deliberately different
    lm = module(folder / model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), **lm_options)
    # All runs of a rank have the same data, which are then read and tokenized once; other processes write their own.
    files = folder / (f"data-of-rank{trainer.global_rank}" if devices > 1 else f"{name}.data")
    files.mkdir(exist_ok=True)
    with patch.object(initialization, "cached_factors", counted):
        examples = data(files, folder / model, batch_size=4 // shares, eval_batch_size=3, **rows)
        trainer.fit(lm, examples, **resume)
    ended = {
        "losses": record.losses,
        "norms": record.norms,
        "state": {k: full_tensor(v).clone() for k, v in adapters_of(trainer).items() if isinstance(v, torch.Tensor)},
        "base": lm._adapter_checkpoint.base(lm),
        "cost": sum(spent),
    }
    restored = {}
    if isinstance(trainer.strategy, FSDPStrategy):  # a module that has been wrapped cannot be wrapped again
        lm, restored = module(folder / model, **lm_options), {"ckpt_path": saving.best_model_path}
    return {**ended, "results": trainer.validate(lm, examples, verbose=False, **restored)}


def refusal(folder: Path, kind: str, **options: Any) -> str:
    """Return what this rank says about a run that is refused."""
    try:
        fit(folder, "refused", kind, **options)
    except ValueError as error:
        return str(error)
    return ""


class OwnProject(LightningModule):
    """Somebody's module that shards its own model, in the order given."""

    def __init__(self, order: str = "inject, shard") -> None:
        super().__init__()
        self.order = order
        self.lm: torch.nn.Module | None = None

    def configure_model(self) -> None:
        if self.lm is not None:
            return
        self.lm = tiny_model("qwen2")
        if "nan" in self.order:
            self.lm.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        if self.order.startswith("inject"):
            inject(self, LoRAConfig(r=4))
        mesh = self.device_mesh["data_parallel"]
        for layer in self.lm.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.lm, mesh=mesh)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.lm(batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        ids = torch.randint(0, 128, (16, 10), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(ids), batch_size=2)


def own_project(folder: Path) -> dict[str, Any]:
    """Train it, and be refused where it shards first or in other ways."""
    messages = {}
    for name, order, chosen in (
        ("order", "shard, inject", ModelParallelStrategy(2, 1)),
        ("nan", "inject nan, shard", ModelParallelStrategy(2, 1)),
        ("tensor parallel", "inject, shard", ModelParallelStrategy(1, 2)),
        ("options", "inject, shard", MiLoRAModelParallelStrategy(reshard_after_forward=False, cpu_offload=True)),
        ("replicas", "inject, shard", MiLoRAModelParallelStrategy(data_parallel_replicate_size=3)),
        ("dtype", "inject, shard", MiLoRAModelParallelStrategy(param_dtype="bfloat16")),
    ):
        trainer = quiet_trainer(folder, max_steps=1, strategy=chosen, devices=2, callbacks=[MiLoRAInit(r=4)])
        try:
            trainer.fit(OwnProject(order))
        except ValueError as error:
            messages[name] = str(error)
    lm = OwnProject()
    trainer = quiet_trainer(
        folder, max_steps=5, strategy=ModelParallelStrategy(2, 1), devices=2, callbacks=[MiLoRAInit(r=4)]
    )
    trainer.fit(lm)
    trainer.save_checkpoint(folder / "own.ckpt")
    factors = {
        f"{name}.{factor}": full_tensor(layer.get_parameter(factor)).detach().clone()
        for name, layer in lora_layers(lm).items()
        for factor in ("lora_A", "lora_B", "initial_A", "initial_B")
    }
    return {"messages": messages, "state": factors}


def command_line(folder: Path, overlay: str | None, *options: str) -> dict[str, float]:
    """Fit and predict with one YAML, and for several devices nothing but an overlay added."""
    configs = ["--config=mine.yaml", *([f"--config={overlay}"] if overlay else [])]
    name = Path(overlay or "single").stem
    os.chdir(folder)
    trainer = main(["fit", *configs, *options, f"--trainer.default_root_dir={name}"]).trainer
    path = trainer.checkpoint_callback.best_model_path
    main(["predict", *configs, "--ckpt_path", path, f"--predictions.output={name}.jsonl"])
    return {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val_")}


def on_two_ranks(folder: Path) -> dict[str, Any]:
    """Make all runs of test_distributed.py that need two processes."""
    runs = {name: fit(folder, name, kind, **options) for name, (kind, options) in RUNS.items()}
    half = {"module": {"dtype": "bfloat16"}, "adapter": {"lora_dropout": 0.1}}
    runs["fsdp2-half"] = fit(folder, "fsdp2-half", "fsdp2", **half)
    for origin in ORIGINS:
        resume = {"ckpt_path": folder / origin / f"step={STEPS // 2}.ckpt"}
        runs[f"{origin} to fsdp2"] = fit(folder, f"{origin}-resumed", "fsdp2-folder", resume=resume)
        runs[f"{origin} to fsdp1"] = fit(folder, f"{origin}-resumed-1", "fsdp1", resume=resume)
    for kind in EXPERT_KINDS:
        runs[f"{kind}-experts"] = fit(folder, f"{kind}-experts", kind, model="experts")
    resume = {"ckpt_path": folder / "fsdp2-folder-experts" / f"step={STEPS // 2}.ckpt"}
    runs["experts resumed"] = fit(folder, "experts-resumed", "fsdp2", model="experts", resume=resume)
    for origin, kind in (("single", "tensor"), ("tensor", "fsdp2")):
        resume = {"ckpt_path": folder / origin / f"step={STEPS // 2}.ckpt"}
        runs[f"{origin} to {kind}"] = fit(folder, f"{origin}-resumed-2", kind, resume=resume)
    for kind, init in (("ddp", "lora_one"), ("fsdp2", "corda")):
        from_data = {"init": init, "statistics_batches": 3, "cache": False}
        runs[f"{kind} from data"] = fit(folder, f"{kind}-{init}", kind, adapter=from_data)
    runs["refused"] = {
        "strict": refusal(folder, "ddp", adapter={"r": 16, "target_modules": ["k_proj"]}, **RUNS["ddp-strict"][1]),
        "beside": refusal(folder, "fsdp2", adapter={"modules_to_save": ["norm"]}, **RUNS["fsdp2-forgetting"][1]),
    }
    runs["own"] = own_project(folder)
    runs["sharding"] = sharding_runs()
    runs["experts"] = expert_runs(folder)
    runs["cli"] = {name: command_line(folder, f"strategy/{name}.yaml") for name in ("ddp", "fsdp2")}
    return runs


def on_two_gpus(folder: Path) -> dict[str, Any]:
    """Train and resume under FSDP1 as Lightning sets it up; train under DDP and FSDP2, which also compiles."""
    options = {"accelerator": "gpu", "precision": "bf16-mixed"}
    resume = {"ckpt_path": folder / "gpu" / f"step={STEPS // 2}.ckpt"}
    half = {"accelerator": "gpu", "module": {"dtype": "bfloat16"}}
    compiled = {"accelerator": "gpu", "module": {"dtype": "bfloat16", "compile": True}}
    return {
        "ddp": fit(folder, "gpu-ddp", "ddp", **half),
        "fsdp2": fit(folder, "gpu-fsdp2", "fsdp2", **half),
        "compiled": fit(folder, "gpu-compiled", "fsdp2", **compiled),
        "gpu": fit(folder, "gpu", "fsdp", **options),
        "resumed": fit(folder, "gpu-resumed", "fsdp", resume=resume, **options),
    }


def save(runs: dict[str, Any], folder: Path, prefix: str = "") -> None:
    torch.save(runs, folder / f"{prefix}rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    save(on_two_gpus(target), target, "gpu-")
