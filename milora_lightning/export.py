"""Adapters as folders that other tools open: PEFT's format, or a merged Hugging Face model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.factors import product_svd, stack_factors
from milora_lightning.fingerprint import fingerprint
from milora_lightning.lora import LoRALinear
from milora_lightning.surgery import lora_layers

CARD = "README.md"
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before a layer's name."""

FACTORS = ("lora_A", "lora_B", "initial_A", "initial_B")
BASE_KEY = "milora_lightning.base"
"""The entry of an exported file's metadata that holds the fingerprint of its base."""


def export_peft(
    module: nn.Module,
    output: str | Path,
    rank: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metrics: Mapping[str, float] | None = None,
    data: str | None = None,
) -> float:
    """Write the adapters as a PEFT folder for the pristine base model.

    ΔW = s (B A − B₀A₀) is a LoRA of rank 2r on the unchanged weight, without loss and with the same scale; adapters
    that started as LoRA's own keep their rank r.

    Args:
        module: A Hugging Face model with adapters, or a module with one such model inside.
        output: Folder to make; it must not exist, or be empty.
        rank: Compress each ΔW to this rank by its SVD.
        tokenizer: Saved beside the adapters.
        metrics: Results for the model card.
        data: What it was trained on, for the model card.

    Returns:
        The share of ‖ΔW‖²_F over all matrices that ``rank`` has cost; 0 without it.

    Raises:
        ValueError: If there are no adapters, or ``rank`` is out of range.
        FileExistsError: If there is something at ``output``.
    """
    model = find_model(module)
    layers = _adapters(module, model)
    if len(_registrations(model)) > len(layers):
        raise ValueError(
            "A layer with an adapter is used in several places of the model, which PEFT cannot express: use the merged "
            "format."
        )
    beside = [name for name, p in model.named_parameters() if p.requires_grad and not _is_factor(name, layers)]
    if beside:
        raise ValueError(
            f"{beside[0]!r} and {len(beside) - 1} more parameters were trained beside the adapters (modules_to_save), "
            "which a PEFT folder of adapters would lose: use the merged format."
        )
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}; leave it out to keep everything.")
    tensors, lost, energy = {}, 0.0, 0.0
    for name, layer in layers.items():
        A, B, scaling = _factors(layer)
        if rank is not None:
            A, B, layer_lost, layer_energy = compress(scaling * B, A, rank)
            lost, energy = lost + layer_lost, energy + layer_energy
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = A.contiguous().cpu()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = B.contiguous().cpu()
    first = next(iter(layers.values()))
    r = int(next(iter(tensors.values())).shape[0])
    config = LoraConfig(
        r=r,
        lora_alpha=r if rank is not None else first.scaling * r,  # type: ignore[arg-type]
        lora_dropout=first.lora_dropout,
        target_modules=_target_modules(model, list(layers)),
        base_model_name_or_path=model.config.name_or_path,
        fan_in_fan_out=first.transposed,
        task_type="CAUSAL_LM" if model.can_generate() else None,
        inference_mode=True,
    )
    with new_folder(output) as folder:
        save_file(
            tensors,
            folder / "adapter_model.safetensors",
            metadata={"format": "pt", BASE_KEY: json.dumps(fingerprint(model))},
        )
        config.save_pretrained(str(folder))
        _finish(folder, model, first, tokenizer, metrics, data, f"PEFT adapter of rank {r} on the unchanged base model")
    return lost / energy if energy else 0.0


def export_merged(
    module: nn.Module,
    output: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metrics: Mapping[str, float] | None = None,
    data: str | None = None,
) -> None:
    """Write a Hugging Face model with the adapters added to its weights.

    Each weight plus its ΔW is summed in float32 and rounded once, to the weight's dtype. The module stays as it is.

    Args:
        module: A Hugging Face model with adapters, or a module with one such model inside.
        output: Folder to make; it must not exist, or be empty.
        tokenizer: Saved beside the model.
        metrics: Results for the model card.
        data: What it was trained on, for the model card.

    Raises:
        ValueError: If there are no adapters, or the model is quantized.
        FileExistsError: If there is something at ``output``.
    """
    model = find_model(module)
    layers = _adapters(module, model)
    if not all(layer.base_layer.get_parameter("weight").is_floating_point() for layer in layers.values()):
        raise ValueError(
            "A quantized model cannot be merged without rounding again: export for PEFT, load that folder into the "
            "unquantized model with load_peft, and merge there."
        )
    state = {}
    places = _registrations(model)
    for key, value in model.state_dict().items():
        if _is_factor(key, places):
            continue
        name, _, leaf = key.rpartition(".base_layer.")
        state[f"{name}.{leaf}" if name else key] = (
            places[name].merged_weight().detach() if leaf == "weight" and name else value
        )
    first = next(iter(layers.values()))
    with new_folder(output) as folder:
        model.save_pretrained(folder, state_dict=state)
        _finish(folder, model, first, tokenizer, metrics, data, "adapters merged into the weights")


@torch.no_grad()
def compress(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Find the best factors of a lower rank, from the SVD of B A without forming it.

    Args:
        B: Factor of shape (out, k).
        A: Factor of shape (k, in).
        rank: Rank to keep; at most k.

    Returns:
        A (rank, in) and B (out, rank), each with the root of the singular values, and the energies ‖·‖²_F that are
        lost and that were there.

    Raises:
        ValueError: If ``rank`` exceeds k.

    >>> B, A = torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)
    >>> A1, B1, lost, energy = compress(B, A, 1)
    >>> (B1 @ A1).round(), lost / energy
    (tensor([[2., 0.],
            [0., 0.]]), 0.2)
    """
    if rank > A.shape[0]:
        raise ValueError(f"rank={rank} is more than the adapters' {A.shape[0]}; leave it out to keep everything.")
    U, S, Vh = product_svd(B, A)
    root = S[:rank].sqrt()
    lost, energy = S[rank:].square().sum().item(), S.square().sum().item()
    small_A, small_B = root[:, None] * Vh[:rank], U[:, :rank] * root
    padding = rank - small_A.shape[0]  # a small matrix may have fewer singular values than that
    small_A, small_B = F.pad(small_A, (0, 0, 0, padding)), F.pad(small_B, (0, padding))
    return small_A.to(A.dtype), small_B.to(B.dtype), lost, energy


def find_model(module: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model that is, or is in, a module.

    Raises:
        ValueError: If there is none.
    """
    model = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)
    if model is None:
        raise ValueError(f"{type(module).__name__} has no Hugging Face model, which these formats are for.")
    return model


def check_output(output: str | Path) -> Path:
    """Return the path of a folder that may be made.

    Raises:
        FileExistsError: If there is something of that name already.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"There is something at {str(target)!r} already. Choose another output, or remove it.")
    return target


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Make a folder that appears under its name when it is whole."""
    target = check_output(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _adapters(module: nn.Module, model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("The model has no adapters to export: load a checkpoint of a run with MiLoRAInit first.")
    outside = [name for name, layer in lora_layers(module).items() if layer not in layers.values()]
    if outside:
        raise ValueError(
            f"Layer {outside[0]!r} has an adapter and is outside the Hugging Face model that these formats hold: leave "
            "it out of target_modules, or export each part by itself."
        )
    return layers


def _registrations(model: nn.Module) -> dict[str, LoRALinear]:
    """All names under which adapters are found, where a layer is used in several places more than one."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in modules if isinstance(layer, LoRALinear)}


def _is_factor(name: str, layers: dict[str, LoRALinear]) -> bool:
    layer, _, factor = name.rpartition(".")
    return layer in layers and factor in FACTORS


@torch.no_grad()
def _factors(layer: LoRALinear) -> tuple[Tensor, Tensor, float]:
    A, B = stack_factors(*layer.factors)
    return A.detach(), B.detach(), layer.scaling


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The short endings of the adapters' names if they mean these layers and no others, else the whole names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    bases = {layer.base_layer for layer in lora_layers(model).values()}
    meant = {
        name
        for name, child in model.named_modules()
        if child not in bases and name.rsplit(".", 1)[-1] in endings and not isinstance(child, nn.ModuleList)
    }
    return endings if meant == set(names) else names


def _finish(
    folder: Path,
    model: PreTrainedModel,
    layer: LoRALinear,
    tokenizer: PreTrainedTokenizerBase | None,
    metrics: Mapping[str, float] | None,
    data: str | None,
    what: str,
) -> None:
    """Add the tokenizer and the model card."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    base = model.config.name_or_path
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in (metrics or {}).items())
    results = f"\n| metric | value |\n|---|---|\n{rows}" if rows else ""
    (folder / CARD).write_text(
        f"---\nbase_model: {base}\nlibrary_name: {'peft' if 'PEFT' in what else 'transformers'}\n"
        f"tags: [milora, lora]\n---\n\n# {Path(base).name}, fine-tuned\n\n"
        f"Fine-tuned from `{base}` with milora-lightning: {what}.\n\n"
        f"Start of the factors: {layer.init}, r = {layer.r}, lora_alpha = {layer.lora_alpha:g}, "
        f"lora_dropout = {layer.lora_dropout:g}, {len(lora_layers(model))} matrices.\n"
        f"{f'{chr(10)}Trained on: `{data}`.{chr(10)}' if data else ''}{results}",
        encoding="utf-8",
    )
