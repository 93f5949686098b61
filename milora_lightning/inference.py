"""Loading models for inference: from a checkpoint, an exported folder or a bare model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.checkpoint.fingerprint import only_codes, unquantized
from milora_lightning.checkpoint.io import KEY, CheckpointError, read
from milora_lightning.checkpoint.options import base_may_have_moved, differences, options_in
from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.data.encoding.chat import ChatTemplateError
from milora_lightning.data.encoding.prompt_format import PromptFormat
from milora_lightning.data.encoding.templates import name_of, with_template
from milora_lightning.export.merging import merge_adapters, rounding_note
from milora_lightning.export.peft_import import load_peft
from milora_lightning.models.files import UnusableModelError
from milora_lightning.models.generation import stop_ids
from milora_lightning.models.pretrained import load_causal_lm, load_tokenizer
from milora_lightning.models.processor import (
    CHOSEN,
    DtypeName,
    hold_in_float32,
    loaded_as,
    warn_of_slow_products,
    warn_of_unused_gpu,
)
from milora_lightning.module import CausalLMModule
from milora_lightning.utils.compat.lightning import is_sharded_folder
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import inform, warn

BASE = "model.name_or_path"
Kind = Literal["checkpoint", "peft", "model"]


def load_for_inference(
    path: str | Path,
    merge: bool = False,
    device: torch.device | str | None = None,
    dtype: DtypeName | None = None,
    name_or_path: str | None = None,
    template: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for inference, and a tokenizer that formats prompts as in training.

    ``tokenizer.apply_chat_template(messages, add_generation_prompt=True, ...)`` formats prompts, and ``model.generate``
    stops at the token that ended answers in training.

    Args:
        path: A checkpoint of ``fit`` (a file, or the folder of a sharded run), a PEFT folder, a merged model's folder,
            or a model without adapters: a Hub name, a folder, a ``.gguf`` file or ``"embedded"``.
        merge: Add the adapters to the weights. Generation is faster and the model consists of transformers' classes
            only, but the base model is no longer available. Warns if rounding to half precision loses much of them.
        device: The device of the model; by default the accelerator, if there is one.
        dtype: Dtype of the base weights, as for :class:`CausalLMModule`; by default the checkpoint's, otherwise
            ``"auto"``.
        name_or_path: The current location of the base of a checkpoint or PEFT folder, if it has moved.
        template: The prompt template, instead of that of training: ``"alpaca"``, ``"chat"``, ``"plain"`` or the path of
            a Jinja file.

    Returns:
        The model in evaluation mode, with adapters if ``path`` has some (see
        :func:`milora_lightning.adapters_disabled`), and the tokenizer. It has no chat template if neither ``path`` nor
        ``template`` provides one.

    Raises:
        FileNotFoundError: If ``path`` or its base model does not exist.
        ValueError: If it cannot be read, does not fit its base, or has other contents, or there is no such device.
    """
    device = device_named(device)
    path, kind = str(path), kind_of(str(path))
    prompt_format, chosen = None, dtype in (None, *CHOSEN)
    if kind == "checkpoint":
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if merge:
            options["quantization"] = None
        module, _ = load_module(path, name_or_path, whole=True, compile=False, gradient_checkpointing=False, **options)
        assert module.model is not None
        model, tokenizer, prompt_format = module.model, module.tokenizer, module.prompt_format
        chosen = module.dtype_name in CHOSEN
        if prompt_format is None and template is None:
            inform(f"{path} does not name a prompt template: the tokenizer's own chat template is used.")
    elif kind == "peft":
        model, tokenizer = _load_peft(Path(path).expanduser(), loaded_as(dtype or "auto"), name_or_path)
    else:
        if name_or_path is not None:
            raise InvalidInputError(
                f"{path!r} is a whole model, and name_or_path names the base of a checkpoint or PEFT folder: leave "
                "it out."
            )
        model, tokenizer = load_causal_lm(path, loaded_as(dtype or "auto")), load_tokenizer(path)
    if merge and (note := rounding_note(merge_adapters(model))):
        warn(note)
    if template is not None:
        prompt_format = format_named(template, tokenizer)
    tokenizer = tokenizer if prompt_format is None else prompt_format.applied_to(tokenizer)
    _end_as_trained(model, tokenizer, prompt_format)
    if chosen and not getattr(model, "is_quantized", False):
        hold_in_float32(model, device)
    elif device.type == "cpu":
        warn_of_slow_products(model.dtype, "give dtype='fast' (--dtype fast) to compute on this CPU")
    return model.to(device).eval(), tokenizer


def device_named(name: torch.device | str | None) -> torch.device:
    """Return the device with this name; by default the accelerator, if there is one.

    Raises:
        ValueError: If this machine has no such device.

    >>> device_named("cpu")
    device(type='cpu')
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        if accelerator is None:
            warn_of_unused_gpu()
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    here = ["cpu"]
    if accelerator is not None:
        here += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if device is None or str(device) not in (*here, "cpu:0"):
        raise InvalidInputError(f"There is no device {str(name)!r} here, only {', '.join(here)}.")
    return device


def kind_of(path: str) -> Kind:
    """Return whether a path is a checkpoint, a PEFT folder or a model.

    Raises:
        UnusableModelError: If it is a folder with checkpoints in it.

    >>> kind_of("runs/milora/last.ckpt"), kind_of("org/name"), kind_of("model.gguf")
    ('checkpoint', 'model', 'model')
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if (place / "adapter_config.json").is_file():
            return "peft"
        if is_sharded_folder(place):
            return "checkpoint"
        checkpoints = sorted(place.glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
        if checkpoints and not (place / "config.json").is_file():
            raise UnusableModelError(
                f"{path!r} is a folder of checkpoints: give one of them, such as {checkpoints[-1]}."
            )
        return "model"
    suffix = place.suffix.lower()
    return "checkpoint" if suffix in (".ckpt", ".pt", ".pth") or (place.is_file() and suffix != ".gguf") else "model"


def load_module(
    ckpt_path: str, name_or_path: str | None = None, whole: bool = False, **options: Any
) -> tuple[CausalLMModule, dict[str, Any]]:
    """Load a checkpoint together with its base model.

    Args:
        ckpt_path: The checkpoint, a file or a folder.
        name_or_path: The current location of the base; by default that of training.
        whole: Also accept a checkpoint of full fine-tuning, which holds no adapters.
        options: Options of :class:`CausalLMModule` that replace those of the checkpoint. With ``quantization=None``,
            adapters of a quantized base are loaded into the unquantized base.

    Returns:
        The module on the CPU, and the content of the checkpoint.

    Raises:
        FileNotFoundError: If the checkpoint or its base does not exist.
        CheckpointError: If it cannot be read, or has another content.
    """
    checkpoint = read(ckpt_path) if whole else read_checkpoint(ckpt_path)
    if whole:
        _check_causal_lm(checkpoint, ckpt_path)
    if name_or_path is not None:
        options["name_or_path"] = name_or_path
    if "quantization" in options and options["quantization"] is None:
        checkpoint = _on_unquantized_base(checkpoint)
    file = io.BytesIO()  # also for a folder, which Lightning could only load in a sharded run
    torch.save(checkpoint, file)
    file.seek(0)
    saved = options_in(checkpoint)
    for line in differences({} if name_or_path is None else {BASE: name_or_path}, saved):
        inform(line)
    with base_may_have_moved("--name_or_path", saved.get(BASE) if name_or_path is None else None):
        return CausalLMModule.load_from_checkpoint(file, map_location="cpu", **options), checkpoint


def _on_unquantized_base(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint with the fingerprint of the unquantized base."""
    quantization = options_in(checkpoint).get("model.quantization")
    description = checkpoint["state_dict"].get(KEY)
    if quantization is None or description is None:
        return checkpoint
    if (name := only_codes(description["base"])) is not None:
        raise CheckpointError(
            f"The checkpoint identifies {name!r} of its base by {quantization} codes only, so an unquantized "
            "base cannot be compared with it: use --format peft, and merge that folder with PEFT."
        )
    inform(f"The base was {quantization} in training; the adapters are merged into its unquantized weights.")
    state = {**checkpoint["state_dict"], KEY: {**description, "base": unquantized(description["base"])}}
    return {**checkpoint, "state_dict": state}


def _check_causal_lm(checkpoint: Any, path: str) -> None:
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{path!r} is not a Lightning checkpoint: it has no state_dict.")
    if BASE not in options_in(checkpoint):
        holds = "load its adapters into that with load_adapter(module, path)" if KEY in checkpoint["state_dict"] else ""
        raise CheckpointError(
            f"{path!r} is a checkpoint of a module of your own, not of a CausalLMModule: "
            f"{holds or 'load it into that'}."
        )


def _load_peft(folder: Path, dtype: str, name_or_path: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        base = name_or_path or json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{str(folder)!r} is not a PEFT adapter folder: adapter_config.json is damaged."
        ) from error
    if not base:
        raise CheckpointError(f"{str(folder)!r} does not say which model its adapters are for: give name_or_path.")
    with base_may_have_moved("--name_or_path", None if name_or_path else base):
        model = load_causal_lm(base, dtype)
    load_peft(model, folder)
    return model, load_tokenizer(str(folder) if any(folder.glob("tokenizer*")) else base)


def format_named(template: str, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return the prompt format of a template.

    Args:
        template: As for :func:`load_for_inference`.
        tokenizer: The tokenizer that formats the prompts.

    Raises:
        ValueError: If there is no such template, or it cannot be used.
    """
    return PromptFormat.of(with_template(tokenizer, template), name_of(template, conversations=True))


def _end_as_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat | None
) -> None:
    """Make ``generate`` stop at the token that ended answers in training, or ends them in the chat template."""
    if prompt_format is None and tokenizer.chat_template:
        try:
            prompt_format = PromptFormat.of(tokenizer, "chat")
        except ChatTemplateError:  # the template cannot be used for training; keep the model's stop tokens
            prompt_format = None
    stop = stop_ids(model, tokenizer, None if prompt_format is None else prompt_format.end_of_turn)
    if stop and model.generation_config is not None:
        model.generation_config.eos_token_id = stop
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
