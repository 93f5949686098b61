"""Files as older versions wrote them, from descriptions of their formats: what today's code has to read.

Two versions are described: ``"first"``, the oldest with checkpoints of format 1, whose descriptions and configurations
had fewer entries; and ``"flat"``, the last before the package had rooms. Nothing here asks today's code how it writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

VERSIONS = ("first", "flat")

TARGETS = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        *(f"self_attn.{each}_proj" for each in "qkvo"),
        *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
    )
]
"""The linear layers of the tests' small Llama, which ``all-linear`` means."""

R, ALPHA = 4, 6.0

PLAIN = (
    "{% set asked = namespace(instruction='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set asked.instruction = message['content'] %}{% elif message['role'] == 'user' %}{% if asked.instruction %}"
    '{{ "" + asked.instruction + "\\n" + message[\'content\'] }}{% else %}{{ "" + message[\'content\'] }}{% endif %}'
    "{% set asked.instruction = '' %}{% else %}{{ \"\\n\" + message['content'] + eos_token }}{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}{{ "\\n" }}{% endif %}'
)
"""The chat template into which ``plain`` was written."""

FSDP2 = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}
"""The strategy of the shipped overlay for FSDP2, which users have in their own files."""

CLASS_PATHS = [
    *(f"milora_lightning.data.{name}" for name in ("Commonsense", "Files", "Instructions", "Math", "Mixture")),
    *(f"milora_lightning.data.{name}" for name in ("MultipleChoice", "SFTDataModule", "Task", "WordProblems")),
    *(f"milora_lightning.{name}" for name in ("AdapterExport", "CausalLMModule", "EvaluationSummary", "MiLoRAInit")),
    *(f"milora_lightning.{name}" for name in ("ForgettingMonitor", "PredictionWriter", "PrincipalProjection")),
    *(f"milora_lightning.{name}" for name in ("RandomState", "RunProgress", "SFTDataModule", "SubspaceMonitor")),
    *(f"milora_lightning.callbacks.{name}" for name in ("MiLoRAInit", "SaveOnInterrupt", "SubspaceMonitor")),
    "milora_lightning.callbacks.milora_init.MiLoRAInit",
    "milora_lightning.data.files.Files",
    "milora_lightning.module.CausalLMModule",
]
"""Classes that configs name by the paths that were documented, or that jsonargparse or a reader of the code writes."""


def hashed(weight: Tensor) -> str:
    """Describe a weight of the base as checkpoints do."""
    weight = weight.detach()
    return f"{tuple(weight.shape)} {weight.dtype} {xxhash.xxh3_128_hexdigest(weight.contiguous().numpy())}"


def factors(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Make up what training has left: initial factors from the weights' smallest triplets, and others beside them."""
    torch.manual_seed(3)
    found = {}
    for name in TARGETS:
        weight = model.get_submodule(name).weight.detach()
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = (S[-R:] * R / ALPHA).sqrt()
        start = {"initial_A": root[:, None] * Vh[-R:], "initial_B": U[:, -R:] * root}
        trained = {f"lora_{f}": start[f"initial_{f}"] + 0.1 * torch.randn_like(start[f"initial_{f}"]) for f in "AB"}
        found[name] = {key: value.contiguous() for key, value in {**trained, **start}.items()}
    return found


def merge(model: nn.Module, trained: dict[str, dict[str, Tensor]]) -> None:
    """Put into the weights of a model what the factors of a checkpoint mean."""
    with torch.no_grad():
        for name, f in trained.items():
            change = f["lora_B"] @ f["lora_A"] - f["initial_B"] @ f["initial_A"]
            model.get_submodule(name).weight += ALPHA / R * change


def write_checkpoint(path: Path, model: nn.Module, version: str, weights_only: bool = False) -> Path:
    """Write a checkpoint after three of six steps of ``fit``, as the Trainer of a version did, for a LightningModule.

    Args:
        path: Of the file.
        model: The base model, which a ``CausalLMModule`` calls ``model``.
        version: One of ``VERSIONS``.
        weights_only: Whether the state of training is left out.

    Returns:
        The path.
    """
    trained = factors(model)
    config: dict[str, Any] = {"r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}
    config |= {"init": "milora", "modules_to_save": ()}
    description: dict[str, Any] = {"format": 1, "version": "0.1.0", "config": config}
    description["adapters"] = [f"model.{name}" for name in TARGETS]
    if version == "flat":
        config |= {"rank_pattern": {}, "alpha_pattern": {}, "exclude_modules": (), "module": None}
        description["uninitialized"] = []
    description["base"] = dict(sorted((f"model.{n}", hashed(p)) for n, p in model.named_parameters()))
    state: dict[str, Any] = {f"model.{name}.{key}": v for name, f in trained.items() for key, v in f.items()}
    state["milora_lightning"] = description
    source: dict[str, Any] = {"batches": 3, "description": "Files(test_sets={}, seed=0)"}
    if version == "flat":
        position = {"epoch": 0, "seed": 0, "global_batch": 4, "consumed": 12, "end": 12, "run_batch": 4, "size": 24}
        prompts = {"template": "plain", "prompt_suffix": "", "chat_template": PLAIN, "end_of_turn": "</s>"}
        source = {"position": position, "description": "Files; seed: 0", "prompt_format": prompts}
    hyper_parameters = {"name_or_path": model.config.name_or_path, "dtype": "auto", "attn_implementation": None}
    hyper_parameters |= {"gradient_checkpointing": False, "compile": False, "lr_scheduler": "linear"}
    hyper_parameters |= {
        "warmup_steps": 2,
        "max_new_tokens": 4,
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    checkpoint: dict[str, Any] = {"epoch": 0, "global_step": 3, "pytorch-lightning_version": "2.6.6", "loops": loops()}
    checkpoint |= {"state_dict": state, "hparams_name": "kwargs", "hyper_parameters": hyper_parameters}
    checkpoint["SFTDataModule"] = source
    if not weights_only:
        checkpoint |= training(trained)
    torch.save(checkpoint, path)
    return path


def training(trained: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Describe what goes on: AdamW's state of each factor, the schedule, what callbacks remember."""
    torch.manual_seed(4)
    parameters = [f[key] for f in trained.values() for key in ("lora_A", "lora_B")]
    moments = {
        index: {
            "step": torch.tensor(3.0),
            "exp_avg": torch.randn_like(p) * 1e-3,
            "exp_avg_sq": torch.rand_like(p) * 1e-5,
        }
        for index, p in enumerate(parameters)
    }
    group = {"lr": 2.25e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    group |= {"maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None}
    group |= {"decoupled_weight_decay": True, "initial_lr": 3e-4, "params": list(range(len(parameters)))}
    schedule = {"base_lrs": [3e-4], "last_epoch": 3, "_step_count": 4, "_is_initial": False, "lr_lambdas": [{}]}
    schedule |= {"_get_lr_called_within_step": False, "_last_lr": [2.25e-4]}
    return {
        "callbacks": {"EvaluationSummary": {"before": {"val_loss": 4.8}, "after": {"val_loss": 4.7}}},
        "optimizer_states": [{"state": moments, "param_groups": [group]}],
        "lr_schedulers": [schedule],
        "random_state": [{"cpu": torch.get_rng_state()}],
    }


def loops() -> dict[str, Any]:
    """Describe how far Lightning's loops are: three batches, three steps, in the first epoch."""

    def counts(number: int, *names: str) -> dict[str, Any]:
        return {when: dict.fromkeys(names, number) for when in ("total", "current")}

    batch, short = ("ready", "completed", "started", "processed"), ("ready", "completed")
    steps = {"optimizer": {"step": counts(3, *short), "zero_grad": counts(3, "ready", "completed", "started")}}
    none = {**counts(0, *batch), "is_last_batch": False}
    fit = {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": 3},
        "epoch_loop.batch_progress": {**counts(3, *batch), "is_last_batch": False},
        "epoch_loop.scheduler_progress": counts(3, *short),
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": steps,
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": counts(0, *short),
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": none,
        "epoch_progress": {when: {"ready": 1, "completed": 0, "started": 1, "processed": 0} for when in counts(0)},
    }
    others = {f"{name}_loop": {"state_dict": {}, "batch_progress": none} for name in ("validate", "test")}
    return {"fit_loop": fit, **others, "predict_loop": {"state_dict": {}, "batch_progress": counts(0, *batch)}}


def write_peft(folder: Path, model: nn.Module, version: str) -> Path:
    """Write the folder for PEFT: for each layer the trained product and the negative initial one, of rank 2r."""
    folder.mkdir()
    tensors = {}
    for name, f in factors(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat([f["lora_A"], f["initial_A"]])
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.cat([f["lora_B"], -f["initial_B"]], dim=1)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    alpha = 2 * ALPHA
    config = {
        "base_model_name_or_path": model.config.name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if version == "flat" else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2 * R,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in TARGETS}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_config(path: Path, folder: Path, version: str) -> Path:
    """Write the config.yaml that a run saved beside its log, with the entries and class paths of a version."""
    files: dict[str, Any] = {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
    files |= {"test": str(folder / "validation.jsonl"), "reference_field": None, "seed": 0}
    files |= {f"{split}_split": split for split in ("train", "validation", "test")}
    model: dict[str, Any] = {"name_or_path": str(folder / "model"), "dtype": "auto", "attn_implementation": None}
    model |= {"gradient_checkpointing": False, "compile": False, "lr_scheduler": "linear", "warmup_steps": 2}
    adamw = {"lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
    adamw |= {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
    model |= {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": adamw}, "max_new_tokens": 4, "metric": None}
    data: dict[str, Any] = {"template": "plain", "prompt_suffix": "", "max_length": 64, "batch_size": 4}
    data |= {"eval_batch_size": None, "generation_batch_size": None, "num_generation_examples": 4}
    data |= {"num_test_generation_examples": None, "answer_by": "generation", "pad_to_multiple_of": 8}
    data |= {"num_proc": None, "num_workers": 0, "seed": 0}
    adapter: dict[str, Any] = {"r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}
    adapter |= {"init": "milora", "modules_to_save": None, "seed": None, "start_from": None, "cache": True}
    saved = {"dirpath": str(folder / "saved"), "save_last": True, "enable_version_counter": False, "verbose": False}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saved},
        {"class_path": "milora_lightning.SubspaceMonitor"},
    ]
    trainer: dict[str, Any] = {"accelerator": "cpu", "strategy": "auto", "devices": "auto", "max_epochs": 1}
    trainer |= {"enable_progress_bar": False, "limit_train_batches": None, "val_check_interval": None}
    trainer |= {"logger": False, "default_root_dir": str(folder / "runs"), "callbacks": callbacks, "plugins": None}
    whole = {"seed_everything": 0, "trainer": trainer, "model": model, "data": data, "adapter": adapter}
    whole["predictions"] = {"output": "predictions.jsonl", "alpaca_eval": None, "generator": "milora"}
    if version == "first":
        files |= {"prompt_field": "instruction", "response_field": "output", "input_field": None, "validation_size": 0}
    else:
        files |= {
            f"{field}_field": "auto" for field in ("prompt", "response", "input", "messages", "tools", "system", "text")
        }
        files["validation_size"] = "auto"
        model |= {"lr_scheduler_kwargs": None, "learning_rate": None, "quantization": None}
        data |= {"train_on": "assistant", "packing": False}
        adapter |= {"rank_pattern": None, "alpha_pattern": None, "exclude_modules": None, "module": None}
        whole |= {"summary": {"samples": 3}, "logger": None}
    data["source"] = {"class_path": "milora_lightning.data.Files", "init_args": files}
    path.write_text(yaml.safe_dump({**whole, "ckpt_path": None, "weights_only": None}))
    return path
