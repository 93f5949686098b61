"""Suggests existing options for one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 3

# Names that other tools use for these options, by the last part of the name.
ELSEWHERE = {
    "r": ("rank", "lora_r", "lora_rank"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "target_modules": ("targets", "lora_target", "lora_target_modules"),
    "init": ("init_lora_weights", "method"),
    "name_or_path": ("model", "model_name", "model_name_or_path", "base_model", "model_id", "checkpoint_dir"),
    "gradient_checkpointing": ("use_gradient_checkpointing",),
    "attn_implementation": ("attention", "flash_attn", "flash_attention"),
    "lr_scheduler": ("scheduler", "lr_scheduler_type"),
    "warmup_steps": ("warmup", "warmup_ratio"),
    "lr": ("learning_rate",),
    "train": ("dataset", "datasets", "data_path", "dataset_name", "train_file", "train_data", "data"),
    "validation": ("val_data", "validation_file", "eval_file", "eval_dataset"),
    "validation_size": ("val_set_size", "val_size", "val_split_fraction"),
    "template": ("chat_template", "prompt_style", "prompt_template"),
    "max_length": ("max_seq_length", "max_seq_len", "seq_length", "sequence_len", "cutoff_len", "block_size"),
    "batch_size": ("micro_batch_size", "train_batch_size", "per_device_train_batch_size"),
    "global_batch_size": ("total_batch_size", "effective_batch_size"),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "accumulate_grad_batches": ("gradient_accumulation_steps", "grad_accum"),
    "gradient_clip_val": ("max_grad_norm", "max_norm", "clip"),
    "max_epochs": ("epochs", "num_epochs", "num_train_epochs"),
    "max_steps": ("steps", "num_steps"),
    "devices": ("gpus", "num_gpus"),
    "default_root_dir": ("output_dir", "out_dir", "save_dir"),
    "log_every_n_steps": ("logging_steps", "log_interval"),
    "val_check_interval": ("eval_steps", "eval_interval"),
    "seed_everything": ("seed",),
    "ckpt_path": ("checkpoint", "resume", "resume_from_checkpoint", "ckpt"),
    "output": ("output_dir", "out"),
}


def suggest(option: str, known: Iterable[str]) -> list[str]:
    """Find the options that may have been meant.

    Args:
        option: An option that does not exist, such as ``--data.batchsize``.
        known: The options that exist.

    Returns:
        The best matches, most likely first; empty if none is similar.

    >>> options = ["--data.batch_size", "--data.eval_batch_size", "--model.optimizer.lr", "--adapter.r", "--config"]
    >>> suggest("--data.batchsize", options), suggest("--lr", options), suggest("--adapter.rank", options)
    (['--data.batch_size'], ['--model.optimizer.lr'], ['--adapter.r'])
    >>> suggest("--confg", options), suggest("--nothing.like.it", options)
    (['--config'], [])
    """
    names = sorted({name for name in known if name.startswith("--")})
    given, last = _plain(option), _plain(option.rpartition(".")[2])
    meant = {_plain(ours) for ours, theirs in ELSEWHERE.items() if last in map(_plain, theirs)}
    found = (
        [name for name in names if _plain(name) == given]
        or _same_place(option, [name for name in names if _plain(name.rpartition(".")[2]) == last])
        or _same_place(option, [name for name in names if _plain(name.rpartition(".")[2]) in meant])
        or difflib.get_close_matches(option, names, MOST, 0.8)
        or [
            name for name in names if difflib.SequenceMatcher(None, _plain(name.rpartition(".")[2]), last).ratio() > 0.8
        ]
    )
    return found[:MOST]


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to another name, or None if none is.

    Args:
        name: The name to look for.
        known: Names to choose from.

    >>> closest("EarlyStoping", ["EarlyStopping", "Timer"]), closest("x", ["abc"])
    ('EarlyStopping', None)
    """
    return next(iter(similar(name, known, 1)), None)


def similar(name: str, known: Iterable[str], most: int = MOST) -> list[str]:
    """Return the known names that are similar to another name, most similar first.

    Args:
        name: The name to look for.
        known: Names to choose from.
        most: Maximum number of results.

    >>> similar("sum", ["gsm8k", "xsum", "sums"])
    ['xsum', 'sums']
    """
    lowered = {each.lower(): each for each in known}
    return [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, most, 0.6)]


def _same_place(option: str, names: list[str]) -> list[str]:
    """Keep the names in the option's group, if there are any."""
    group = option.rpartition(".")[0]
    return [name for name in names if group and name.startswith(group)] or names


def _plain(option: str) -> str:
    return option.lstrip("-").replace("_", "").replace("-", "").lower()
