"""Loading of models quantized by bitsandbytes, with access to the unquantized weights in their files."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from milora_lightning.adapters.base_weight import STORED
from milora_lightning.adapters.experts import is_of_experts, stacked_weights
from milora_lightning.adapters.quantization import BITSANDBYTES
from milora_lightning.models.files import UnusableModelError, weight_files
from milora_lightning.utils.errors import MissingPackageError
from milora_lightning.utils.messages import warn
from milora_lightning.utils.precision import name_of_dtype

Quantization = Literal["nf4", "fp4", "int8"]


@dataclass(frozen=True)
class StoredWeight:
    """The location of a quantized layer's original weight.

    Args:
        path: A safetensors file.
        name: The tensor's name in it.
        dtype: The model's dtype, which the weight would have if it were not quantized.
        quantization: How the layer is quantized.
    """

    path: str
    name: str
    dtype: torch.dtype
    quantization: str

    def read(self) -> Tensor:
        """Read the weight in the shape that it has in the file."""
        with safe_open(self.path, "pt") as file:
            return cast(Tensor, file.get_tensor(self.name)).to(self.dtype)


def quantized_loading(
    name_or_path: str, config: PretrainedConfig, quantization: Quantization, device: torch.device | str
) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` to quantize all linear layers except the language-model head.

    The scales of four-bit codes are quantized, too (double quantization); products are computed in the model's dtype.

    Args:
        name_or_path: What the user has named.
        config: The model's configuration, whose ``dtype`` is that of the other weights.
        quantization: ``nf4``, ``fp4`` or ``int8``.
        device: Where to quantize and place the model.

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed.
        ValueError: If the model is quantized in its files.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f'quantization: {quantization} needs the package bitsandbytes: pip install "milora-lightning[quantization]"'
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnusableModelError(
            f"The files of {name_or_path!r} are quantized already: leave model.quantization out, or name the "
            "unquantized model."
        )
    if quantization == "int8":
        bnb_config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        bnb_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=config.dtype or torch.float32,
        )
    return {"quantization_config": bnb_config, "device_map": {"": device}}


def without_mxfp4(config: PretrainedConfig) -> bool:
    """Make transformers dequantize a model with MXFP4 codes, such as GPT-OSS, while loading it.

    By default transformers does this only if it has no kernels for the codes. These kernels compute no gradients, and
    with them there are no weights that adapters could start from.

    Args:
        config: The model's configuration; changed in place.

    Returns:
        Whether it has such codes.
    """
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, dict) or found.get("quant_method") != "mxfp4":
        return False
    found["dequantize"] = True
    return True


def remember_stored_weights(model: PreTrainedModel, location: str, quantization: Quantization) -> None:
    """Record on each quantized layer where its unquantized weight is stored; warn if some are not found.

    Args:
        model: A model that was quantized when it was loaded.
        location: The folder or Hub name that it was loaded from.
        quantization: How it was quantized.
    """
    files = weight_files(location)
    missing, number = [], 0
    for name, layer in model.named_modules():
        if type(layer._parameters.get("weight")).__name__ not in BITSANDBYTES:
            continue
        number += 1
        key = f"{name}.weight"
        stored = next((k for k in (key, key.removeprefix(f"{model.base_model_prefix}.")) if k in files), None)
        if stored is None:
            missing.append(key)
        else:
            setattr(layer, STORED, StoredWeight(files[stored], stored, model.dtype, quantization))
    _say_what_stays(model)
    if missing:
        warn(
            f"The files of {location!r} do not have {len(missing)} of the {number} quantized weights under the names "
            f"that the model uses ({missing[0]!r}): their adapters start from the dequantized weights.",
        )


def _say_what_stays(model: PreTrainedModel) -> None:
    stacks = [stack.weight for name, stack in stacked_weights(model).items() if is_of_experts(name, stack)]
    if stacks:
        size, dtype = sum(weight.nbytes for weight in stacks), name_of_dtype(stacks[0].dtype)
        warn(
            f"bitsandbytes quantizes linear layers alone: the experts of this mixture, which are 3-D parameters, stay "
            f"in {dtype} and take {size / 1e9:.3g} GB."
        )
