"""How a module loads its causal language model: checks beforehand, then loading, whole or into shards."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.surgery import inject
from milora_lightning.config import LoRAConfig
from milora_lightning.data.model_check import check_model
from milora_lightning.models.choosing_attention import AUTO, choose_attention
from milora_lightning.models.compile import compile_layers
from milora_lightning.models.files import takes_images
from milora_lightning.models.kernels import apply_liger
from milora_lightning.models.packed_rows import check_takes_positions
from milora_lightning.models.pretrained import load_causal_lm, load_config, load_tokenizer
from milora_lightning.models.processor import (
    CHOSEN,
    DtypeName,
    held_as,
    hold_in_float32,
    loaded_as,
    warn_of_slow_products,
)
from milora_lightning.models.quantized import Quantization
from milora_lightning.models.recompute import check_share, recompute_layers
from milora_lightning.models.streaming import empty_causal_lm, stream_weights
from milora_lightning.strategies.base import shard_model, sharding_of, shards
from milora_lightning.training.evaluation import EvaluatedModule
from milora_lightning.training.loss_scaling import check_loss_scaling, is_float16
from milora_lightning.utils.allocator import map_large_tensors
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import inform


class LoadedModule(EvaluatedModule):
    """A module that loads a causal language model in ``configure_model``, as required by the run and its strategy.

    Attributes:
        model: The model; None before it is loaded.
        tokenizer: Its tokenizer, loaded with it.
        milora_config: The configuration of the adapters that this run trains; set by
            :class:`milora_lightning.MiLoRAInit`.
    """

    tokenizer: PreTrainedTokenizerBase
    milora_config: LoRAConfig | None = None

    def set_model_options(
        self,
        name_or_path: str,
        dtype: DtypeName,
        attn_implementation: str | None,
        gradient_checkpointing: bool | float,
        compile: bool,
        quantization: Quantization | None,
        liger: bool,
    ) -> None:
        """Set which model to load, and how; for the arguments see :class:`milora_lightning.CausalLMModule`."""
        check_share(gradient_checkpointing)
        self.name_or_path = name_or_path
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.quantization = quantization
        self.liger = liger
        self.model: PreTrainedModel | None = None

    def setup(self, stage: str) -> None:
        """Refuse options of loading that the run does not support."""
        super().setup(stage)
        if self.quantization is not None:
            self._check_quantized(stage)
        if stage == "fit":
            check_loss_scaling(self.trainer, self, self.dtype_name == "float16")

    def prepare_data(self) -> None:
        """Before tokenizing, refuse a model that is not a causal language model or cannot be trained as configured."""
        if self.model is None and type(self).configure_model is LoadedModule.configure_model:
            config, device = load_config(self.name_or_path), self.trainer.strategy.root_device
            if self._is_fitting:
                half = held_as(self.dtype_name, config.dtype, device.type) == torch.float16
                check_loss_scaling(self.trainer, self, half)

    def configure_model(self) -> None:
        """Load the model, once, and check that it fits the data."""
        if self.model is None:
            self._build()
        if self.sft_data is not None:
            check_model(self.sft_data, self, self.sft_data.pad_to_multiple_of)
            if remedy := self.sft_data.remedy_for_shared_rows():
                check_takes_positions(self._built(), remedy)

    def load_model(self) -> PreTrainedModel:
        """Load the model or, if it will be sharded, create it without weights. Override this to load it differently."""
        origin = self.name_or_path, loaded_as(self.dtype_name), self._attention()
        if self.device_mesh is not None:
            return empty_causal_lm(*origin)
        device = torch.device("cpu") if self._trainer is None else self._trainer.strategy.root_device
        return load_causal_lm(*origin, self.quantization, device)

    def _attention(self) -> str | None:
        """Return the name of the attention to load the model with; None for transformers' choice."""
        if self.attn_implementation != AUTO:
            return self.attn_implementation
        if self._trainer is None:
            return None
        config, device = load_config(self.name_or_path), self._trainer.strategy.root_device
        choice = choose_attention(config, held_as(self.dtype_name, config.dtype, device.type), device)
        if self._is_fitting:
            inform(choice.in_words)
        return choice.name

    def _build(self) -> None:
        mesh = self.device_mesh
        device = None if self._trainer is None else self._trainer.strategy.root_device
        self._check_strategy(mesh)
        if self.gradient_checkpointing and device is not None and device.type == "cpu":
            map_large_tensors()
        model = self.load_model()
        recompute_layers(model, self.gradient_checkpointing)
        if self.liger and device is not None:
            apply_liger(model, device)
        if self.compile_layers:
            compile_layers(model, device)
        if device is not None:
            self._suit_processor(model, device)
        if self._is_fitting:
            check_loss_scaling(self.trainer, self, is_float16(model))
        self.model = model.train()
        if mesh is not None:
            self._fill_shards(model)
        self.tokenizer = load_tokenizer(self.name_or_path)

    def _fill_shards(self, model: PreTrainedModel) -> None:
        """FSDP2's order: inject adapters, then shard, then read the weights."""
        if self.milora_config is not None:
            inject(self, self.milora_config)
        strategy = self.trainer.strategy
        shard_model(strategy, model)
        stream_weights(model, self.name_or_path, strategy.root_device, sharding_of(strategy).cpu_offload)

    def _suit_processor(self, model: PreTrainedModel, device: torch.device) -> None:
        """On a CPU without products in the model's dtype, use float32, or warn if the user has fixed the dtype."""
        # Fully trained weights would then be saved in float32, and rounded when they are loaded.
        adapters = self.milora_config is not None or not self._is_fitting
        # Rounding is done by the loader; shards are read unchanged from the files.
        rounds = self.dtype_name == "fast" and self.device_mesh is not None
        if self.dtype_name in CHOSEN and adapters and not rounds and not getattr(model, "is_quantized", False):
            hold_in_float32(model, device)
        if device.type == "cpu":
            warn_of_slow_products(model.dtype)

    def _check_quantized(self, stage: str) -> None:
        if shards(self.trainer.strategy):
            raise InvalidInputError(
                f"quantization: {self.quantization} does not work with sharded models, whose weights are read shard by "
                "shard: leave it out, or use one device or strategy: ddp."
            )
        if stage == "fit" and self.milora_config is None and not lora_layers(self):
            raise InvalidInputError(
                f"Weights with quantization: {self.quantization} cannot be trained themselves: train adapters "
                "(adapter.init: milora), or leave quantization out."
            )

    def _check_strategy(self, mesh: DeviceMesh | None) -> None:
        """Refuse options that do not work with sharding."""
        if self._trainer is None:
            return
        strategy = self._trainer.strategy
        if self.compile_layers and mesh is None and shards(strategy):
            raise InvalidInputError(
                "compile: true does not work under FSDPStrategy (FSDP1): leave it out, or use FSDP2 (strategy: "
                "milora_fsdp2)."
            )
        if mesh is None:
            return
        if self.compile_layers and mesh["tensor_parallel"].size() > 1:
            raise InvalidInputError("compile: true does not work with tensor_parallel_size above 1: leave one out.")
        if takes_images(load_config(self.name_or_path)):
            raise InvalidInputError(
                "A model that takes images cannot be sharded yet: use strategy: ddp, and quantization: nf4 if it is "
                "too large."
            )
        if self.gradient_checkpointing and (chosen := sharding_of(strategy).activation_checkpointing) is not None:
            raise InvalidInputError(
                f"gradient_checkpointing is {self.gradient_checkpointing}, and the strategy's "
                f"activation_checkpointing {chosen}: leave one of them out."
            )

    def _built(self) -> PreTrainedModel:
        if self.model is None:
            raise RuntimeError("The model is not loaded yet: call configure_model() before using the module alone.")
        return self.model
