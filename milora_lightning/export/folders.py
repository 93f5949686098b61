"""Exporting adapters to folders for other tools: in PEFT's format, or as a merged Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import holds_its_weight, is_embedding
from milora_lightning.analysis.intruders import Intruders
from milora_lightning.checkpoint.fingerprint import fingerprint, unquantized
from milora_lightning.data.encoding.prompt_format import PromptFormat
from milora_lightning.export.merging import as_dtype, is_factor, merged_state
from milora_lightning.export.model_card import CARD, model_card
from milora_lightning.export.models import find_model, is_in, registrations
from milora_lightning.export.peft_attention import complete
from milora_lightning.export.peft_format import (
    BASE_KEY,
    HEADS,
    MERGED,
    PEFT_PREFIX,
    base_name,
    lora_config,
    peft_module_names,
    task_type,
)
from milora_lightning.export.peft_layers import (
    as_written,
    in_peft,
    update_factors,
)
from milora_lightning.export.peft_trial import opens_otherwise, tried
from milora_lightning.export.serving import save_tokenizer
from milora_lightning.export.shrinking import shrunk
from milora_lightning.models.files import takes_images
from milora_lightning.models.pretrained import load_processor
from milora_lightning.models.processor import NUMBERS
from milora_lightning.utils.compat.transformers import written_as_it_is
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError
from milora_lightning.utils.folders import check_output, new_folder
from milora_lightning.utils.messages import warn
from milora_lightning.utils.names import unwrapped_name
from milora_lightning.utils.precision import name_of_dtype


def export_peft(
    module: nn.Module,
    output: str | Path,
    rank: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metrics: Mapping[str, float] | None = None,
    data: str | None = None,
    prompt_format: PromptFormat | None = None,
    shrink_intruders: Intruders | float | None = None,
) -> float:
    """Export the adapters to a PEFT folder for the unchanged base model.

    ΔW = s (B A − B₀A₀) is exactly a LoRA of rank 2r with the same scale on the unchanged weight; adapters with
    ``init="lora"`` keep their rank r. Modules that were trained in full (``modules_to_save``), and the head of a
    classifier, become PEFT's ``modules_to_save``. The folder is created only after PEFT has opened it, with a copy of
    the model without weights, and the result was correct.

    Args:
        module: A Hugging Face model with adapters, or a module with one such model inside.
        output: Folder to create; it must not exist, or must be empty.
        rank: Compress each ΔW to this rank by its SVD; a ΔW of lower rank is not changed.
        tokenizer: The tokenizer to save with the adapters.
        metrics: Results for the model card.
        data: A description of the training data, for the model card.
        prompt_format: The prompt format of training; the exported chat template and the model card use it.
        shrink_intruders: Shrink the intruder dimensions of W + ΔW to this fraction of their singular values, as PEFT's
            ``reduce_intruder_dimension`` does, but without truncating the result to rank r: each adds one to the rank.

    Returns:
        The fraction of ‖ΔW‖²_F, over all matrices, that compression to ``rank`` has lost; 0 without ``rank``.

    Raises:
        ValueError: If there are no adapters, ``rank`` is out of range, or PEFT cannot represent what was trained.
        FileExistsError: If ``output`` exists and is not empty.
    """
    check_output(output)
    model = find_model(module)
    layers = _adapters(module, model)
    said, by_weight = tried(model)
    if said:
        raise InvalidInputError(f"PEFT cannot represent these adapters: {said}. {MERGED}")
    kept = _kept_whole(model, layers)
    inside = tuple(f"{name}." for name in kept)
    outside = {name: layer for name, layer in layers.items() if not f"{name}.".startswith(inside)}
    if not outside:
        raise InvalidInputError(
            f"All adapters are in {', '.join(kept)}, which PEFT saves in full for this task. {MERGED}"
        )
    _check_rank(rank, outside, may_grow=shrink_intruders is not None)
    added = shrunk(outside, shrink_intruders)
    tensors: dict[str, Tensor] = {}
    ranks, alphas, lost, energy = {}, {}, 0.0, 0.0
    pairs = {}
    for name, layer in outside.items():
        A, B, layer_lost, layer_energy = update_factors(layer, rank, added.get(layer))
        lost, energy = lost + layer_lost, energy + layer_energy
        ranks[name] = n = A.shape[-2]
        whole = layer.update_rank + (added[layer][1].shape[-2] if layer in added else 0)
        alphas[name] = n if n < whole else layer.lora_alpha * n / layer.r
        pairs[name] = in_peft(layer, A, B)
    complete(model, pairs, ranks, alphas)
    for name, place in peft_module_names(model, pairs).items():
        for factor, value in zip(("lora_A", "lora_B"), pairs[name], strict=True):
            tensors[f"{PEFT_PREFIX}{place}.{factor}.weight"] = value.contiguous().cpu()
    for key, value in merged_state(model, dtype=torch.float32, only=inside)[0].items():
        tensors[PEFT_PREFIX + key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    config = lora_config(model, ranks, alphas, kept, by_weight)
    with new_folder(output) as folder:
        save_file(
            as_written(tensors, {PEFT_PREFIX + n for n, layer in outside.items() if is_embedding(layer.base_layer)}),
            folder / "adapter_model.safetensors",
            metadata={"format": "pt", BASE_KEY: json.dumps(unquantized(fingerprint(model)))},
        )
        config.save_pretrained(str(folder))
        scales = {name: alphas[name] / ranks[name] for name in ranks}
        if said := opens_otherwise(folder, model, tensors, scales):
            raise InvalidInputError(
                f"PEFT {version('peft')} would not load this export as it was trained: {said}. {MERGED}"
            )
        what = f"PEFT adapter of rank {_range(ranks.values())} on the unchanged base model"
        _finish(folder, model, model_card(model, what, "peft", metrics, data), tokenizer, prompt_format)
    return lost / energy if energy else 0.0


def export_merged(
    module: nn.Module,
    output: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metrics: Mapping[str, float] | None = None,
    data: str | None = None,
    dtype: torch.dtype | str | None = None,
    prompt_format: PromptFormat | None = None,
    shrink_intruders: Intruders | float | None = None,
) -> float:
    """Export a Hugging Face model with the adapters added to its weights.

    Each weight and its ΔW are added in float32 and rounded once. The module is not changed.

    Args:
        module: A Hugging Face model with adapters, or a module with one such model inside.
        output: Folder to create; it must not exist, or must be empty.
        tokenizer: The tokenizer to save with the model.
        metrics: Results for the model card.
        data: A description of the training data, for the model card.
        dtype: Dtype of the whole model, ``torch.float32`` or ``"float32"``. By default each weight keeps its dtype (or
            that of the files, if a CPU has kept a half-precision model in float32), and half-precision weights lose the
            parts of ΔW that are smaller than their last digit.
        prompt_format: The prompt format of training; the exported chat template and the model card use it.
        shrink_intruders: Shrink the intruder dimensions of W + ΔW to this fraction of their singular values, as PEFT's
            ``reduce_intruder_dimension`` does.

    Returns:
        The relative rounding error of ΔW: ‖round(W + ΔW) − W − ΔW‖_F / ‖ΔW‖_F over all matrices.

    Raises:
        ValueError: If there are no adapters, the model is quantized, or a number is too large for the dtype.
        FileExistsError: If ``output`` exists and is not empty.
    """
    check_output(output)
    model = find_model(module)
    wanted = as_dtype(dtype) or getattr(model, NUMBERS, None)
    layers = _adapters(module, model)
    if not all(holds_its_weight(layer.base_layer) for layer in layers.values()):
        raise InvalidInputError(
            "A quantized model cannot be merged without rounding it again: export for PEFT, load that folder into the "
            "unquantized model with load_peft, and merge there."
        )
    state, lost = merged_state(model, wanted, corrections=shrunk(layers, shrink_intruders))
    base_dtype = next(iter(layers.values())).base_layer.weight.dtype
    with new_folder(output) as folder:
        before = model.config.dtype
        with written_as_it_is(model):
            model.save_pretrained(folder, state_dict=state)
        model.config.dtype = before
        _set_dtype(folder / "config.json", wanted or base_dtype)
        card = model_card(model, "adapters merged into the weights", "transformers", metrics, data)
        _finish(folder, model, card, tokenizer, prompt_format)
    return lost


def _adapters(module: nn.Module, model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise InvalidInputError(
            "The model has no adapters to export: load a checkpoint of a run with MiLoRAInit first."
        )
    outside = [name for name, layer in lora_layers(module).items() if layer not in layers.values()]
    if outside:
        raise InvalidInputError(
            f"Layer {outside[0]!r} has an adapter and is outside the Hugging Face model to export: leave it out of "
            "target_modules, or export each part separately."
        )
    return layers


def _check_rank(rank: int | None, layers: Mapping[str, LoRALinear], may_grow: bool) -> None:
    if rank is None:
        return
    if rank < 1:
        raise InvalidInputError(f"rank must be at least 1, not {rank}; leave it out to keep everything.")
    largest = max(layer.update_rank for layer in layers.values())
    if rank > largest and not may_grow:
        raise InvalidInputError(f"rank={rank} is more than the adapters' {largest}; leave it out to keep everything.")


def _kept_whole(model: PreTrainedModel, layers: Mapping[str, LoRALinear]) -> list[str]:
    """Return the names of the modules that a PEFT folder stores in full: other trained modules, and task heads."""
    endings = HEADS.get(task_type(model) or "", ())
    modules = dict.fromkeys(unwrapped_name(n) for n, _ in model.named_modules())
    heads = [n for n in modules if n.endswith(endings)] if endings else []
    parameters = [(unwrapped_name(n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    owners = {n.rpartition(".")[0] for n, p in parameters if p.requires_grad and not is_factor(n, registrations(model))}
    kept = sorted(owner for owner in owners if not any(is_in(owner, head) for head in heads))
    for name in kept:
        inside = [layer for layer in layers if is_in(layer, name)]
        if inside or not name:
            raise InvalidInputError(
                f"Module {name or type(model).__name__!r} trains a parameter of its own and contains adapters, "
                f"which PEFT cannot represent. {MERGED}"
            )
    return heads + kept


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights into a saved configuration and those of the model's parts."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if key in part or (part is config and key == "dtype"):
                part[key] = name_of_dtype(dtype)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _range(values: Iterable[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _finish(
    folder: Path,
    model: PreTrainedModel,
    card: str,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt_format: PromptFormat | None,
) -> None:
    """Add the tokenizer, the processor of a model that takes images, and the model card."""
    if takes_images(model.config):
        _save_processor(folder, base_name(model))
    if tokenizer is not None:
        card += save_tokenizer(folder, model, tokenizer, prompt_format)
    (folder / CARD).write_text(card, encoding="utf-8")


def _save_processor(folder: Path, base: str) -> None:
    try:
        load_processor(base).save_pretrained(folder)
    except MiLoRAError as error:  # everything else has been saved
        warn(f"The processor of images is not exported, so copy its files from the base model to {folder}: {error}")
