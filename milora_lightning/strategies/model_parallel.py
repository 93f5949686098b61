"""FSDP2: checkpoints of sharded adapters, as a file or a folder, which any number of ranks can load."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from milora_lightning.checkpoint.adapter import AdapterCheckpoint
from milora_lightning.checkpoint.io import KEY
from milora_lightning.models.checkpointing import Recomputation, checkpoint_layers
from milora_lightning.models.sharding import DType, Sharding, reduce_unused, shard
from milora_lightning.models.tensor_parallel import parallelize
from milora_lightning.parallel.agreement import check_same_batch, same_random_state
from milora_lightning.parallel.dtensor import shard_like
from milora_lightning.parallel.gathering import TENSOR
from milora_lightning.strategies.loading import load_adapters
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import replace_by
from milora_lightning.utils.names import unwrapped_name

REPLICATE, SHARD = "data_parallel_replicate", "data_parallel_shard"
"""Names of the mesh's data-parallel dimensions if shards are replicated; otherwise there is only ``data_parallel``."""


class MiLoRAModelParallelStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, ``milora_fsdp2``, whose checkpoints hold adapters and other trained weights.

    Args:
        data_parallel_size: Number of devices over which batches are distributed; ``"auto"`` for all of them.
        tensor_parallel_size: Number of devices that split each layer and compute it together on the same batches;
            ``"auto"`` for those of a node. Requires a frozen language model with adapters and a tensor-parallel plan in
            transformers.
        save_distributed_checkpoint: Whether each rank writes its shards into a folder; otherwise one file is written.
        data_parallel_replicate_size: Number of groups of devices, such as nodes, that each hold the whole model in
            shards (HSDP). Weights are then gathered within a group, and only gradients are communicated between groups.
        reshard_after_forward: Whether a decoder layer's gathered weights are freed after its forward and gathered again
            for its backward. By default this applies to all layers but the last, whose backward comes next. ``true``
            includes the last layer, ``false`` keeps all weights (faster, but each device needs memory for the whole
            model), and a number reshards to groups of that many ranks, such as those of a node.
        param_dtype: Dtype in which weights are gathered and computed with, in full fine-tuning; adapters stay float32.
        reduce_dtype: Dtype in which gradients are summed over ranks; by default that of the gradients.
        cpu_offload: Whether shards, gradients and optimizer state are kept on the CPU, where the optimizer then runs.
        activation_checkpointing: Which activations are recomputed in backward: ``full`` for those of every decoder
            layer, ``selective`` for the same without attention, a number n for those of every n-th layer.
        **kwargs: Further arguments of ``ModelParallelStrategy``.

    Raises:
        ValueError: If a number is out of range; when the processes are connected, if it does not divide the number of
            processes.
    """

    sharding = Sharding()  # also for Lightning's objects that become instances of this class
    replicate_size = 1
    _shards = False  # whether the model has been sharded by this strategy

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        save_distributed_checkpoint: bool = False,
        data_parallel_replicate_size: int = 1,
        reshard_after_forward: bool | int | None = None,
        param_dtype: DType | None = None,
        reduce_dtype: DType | None = None,
        cpu_offload: bool = False,
        activation_checkpointing: Recomputation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, **kwargs)
        self.sharding = Sharding(
            reshard_after_forward, param_dtype, reduce_dtype, cpu_offload, activation_checkpointing
        )
        self.replicate_size = data_parallel_replicate_size

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the name ``milora_fsdp2``."""
        strategy_registry.register("milora_fsdp2", cls, description=cls.__doc__, override=True)

    def setup_environment(self) -> None:
        """Connect the processes and create the device mesh.

        Raises:
            ValueError: If the sizes of groups do not divide the number of processes.
        """
        if self._data_parallel_size == "auto" and self._tensor_parallel_size != "auto":
            # Lightning's default is one per node
            self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        if self.sharding.cpu_offload and self._process_group_backend is None and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # gloo sums norms of gradients on the CPU
        super().setup_environment()
        data, replicas = self.device_mesh["data_parallel"].size(), self.replicate_size
        if replicas < 1 or data % replicas:
            raise InvalidInputError(
                f"data_parallel_replicate_size is {replicas}, which does not divide the {data} ranks that share the "
                "batches: the ranks of each group hold one copy of the model."
            )
        shards, kept = data // replicas, self.sharding.reshard_after_forward
        if kept not in (None, True, False) and shards % kept:
            raise InvalidInputError(
                f"reshard_after_forward is {kept}, which does not divide the {shards} ranks that share the weights."
            )
        if replicas > 1:
            sizes = replicas, shards, self.device_mesh[TENSOR].size()
            self._device_mesh = init_device_mesh(
                self.root_device.type, sizes, mesh_dim_names=(REPLICATE, SHARD, TENSOR)
            )
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = self._device_mesh

    @property
    def data_parallel_mesh(self) -> DeviceMesh:
        """The ranks to shard weights across, for ``fully_shard``; in two dimensions if shards are replicated."""
        names = self.device_mesh.mesh_dim_names or ()
        return self.device_mesh[REPLICATE, SHARD] if REPLICATE in names else self.device_mesh["data_parallel"]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments for this rank's sampler; all ranks of a tensor-parallel group get the same batches."""
        size = self.device_mesh[TENSOR].size()
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    def shard(self, model: PreTrainedModel) -> None:
        """Shard a language model with the strategy's options; call it in ``configure_model``, after ``inject``.

        Args:
            model: The model, with its adapters, on this rank's device (the CPU, if it is offloaded) or without weights.

        Raises:
            ValueError: If the model cannot be sharded or split like this.
        """
        tensor_parallel = self.device_mesh[TENSOR]
        if tensor_parallel.size() > 1:
            parallelize(model, tensor_parallel)
        if self.sharding.activation_checkpointing is not None:
            checkpoint_layers(model, self.sharding.activation_checkpointing)
        shard(model, self.data_parallel_mesh, self.sharding)
        self._shards = True

    def check(self) -> None:
        """Refuse settings that do not work with adapters.

        Raises:
            ValueError: If there is such a setting.
        """
        kept, size = self.sharding.reshard_after_forward, self.device_mesh[TENSOR].size()
        if size > 1 and kept not in (None, True, False):
            raise InvalidInputError(
                f"reshard_after_forward: {kept} does not work with tensor_parallel_size: {size}: set true or false."
            )
        if self.precision_plugin.precision == "16-mixed":
            raise InvalidInputError(
                "precision 16-mixed scales gradients, which FSDP2 does not do: set precision: bf16-mixed."
            )
        if self.sharding.param_dtype is not None:
            raise InvalidInputError(
                f"param_dtype: {self.sharding.param_dtype} would gather the adapters' factors in that dtype as well, "
                "which rounds small updates away: leave it out, and set the dtype of the frozen weights "
                "(model.dtype: bfloat16) or precision: bf16-mixed."
            )

    def setup(self, trainer: Trainer) -> None:
        """Set up optimizers.

        Raises:
            ValueError: If the module has ignored options of the strategy.
        """
        if self.sharding != Sharding() and not self._shards:
            given = [name for name, value in vars(self.sharding).items() if value != getattr(Sharding(), name)]
            raise InvalidInputError(
                f"{', '.join(given)} of {type(self).__name__} had no effect: {type(self.lightning_module).__name__} "
                "shards its model itself. In configure_model, call self.trainer.strategy.shard(model), or leave the "
                "options out and pass them to fully_shard."
            )
        size = self.device_mesh[TENSOR].size()
        if size > 1 and not self._shards and AdapterCheckpoint.of(self.lightning_module) is not None:
            raise InvalidInputError(
                f"tensor_parallel_size is {size}, and {type(self.lightning_module).__name__} has not split its layers: "
                "in configure_model, after inject, call self.trainer.strategy.shard(model), or set "
                f"tensor_parallel_size: 1 and data_parallel_size: {self.world_size}."
            )
        super().setup(trainer)
        assert self.model is not None
        reduce_unused(self.model)

    def on_train_start(self) -> None:
        """Make the ranks of a tensor-parallel group draw the same dropout masks."""
        same_random_state(self.device_mesh[TENSOR], self.root_device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check in an epoch's first batch that the ranks of a tensor-parallel group have the same data."""
        if batch_idx == 0:
            check_same_batch(self.device_mesh[TENSOR], batch)

    def model_to_device(self) -> None:
        """Move the model to this rank's device, except shards, which are already there or offloaded to the CPU."""
        assert self.model is not None
        device = self.root_device
        self.model._apply(lambda t: t if isinstance(t, DTensor) else t.to(device))  # type: ignore[no-untyped-call]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; all ranks must call this. An existing one is replaced only when the new one is complete.

        Args:
            checkpoint: The content, from ``Trainer.save_checkpoint``.
            filepath: File, or folder if each rank writes its shards, to create or replace.
            storage_options: Not supported by the strategy.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)  # replaces the file atomically
            return
        path = Path(self.broadcast(filepath))
        unfinished = path.with_name(f".{path.name}.unfinished")
        if self.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.barrier()
        # The description of the adapters is not a tensor, so it goes into the metadata of the folder.
        state = dict(checkpoint["state_dict"])
        described = {KEY: state.pop(KEY)} if KEY in state else {}
        super().save_checkpoint({**checkpoint, **described, "state_dict": state}, unfinished, storage_options)
        self.barrier()
        if self.is_global_zero:
            replace_by(path, unfinished)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of adapters by :func:`load_adapters`, any other checkpoint by Lightning's method."""
        module = self.lightning_module
        assert module is not None
        if AdapterCheckpoint.of(module) is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        load_module = partial(_load_module, module, strict=module.strict_loading)
        return load_adapters(self, checkpoint_path, load_module, _load_optimizer)


def _load_module(module: nn.Module, state: dict[str, Any], strict: bool) -> None:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    here = {unwrapped_name(name): tensor for name, tensor in named}
    plain = {unwrapped_name(key): value for key, value in state.items()}
    sharded = {key: shard_like(value, here[key]) if key in here else value for key, value in plain.items()}
    module.load_state_dict(sharded, strict=strict)


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Shard the state of each parameter like the parameter itself.

    Saved parameters are identified by numbers or names, depending on the strategy; their order is always the same.
    """
    saved = [key for group in state["param_groups"] for key in group["params"]]
    here = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def sharded(value: Any, parameter: Tensor) -> Any:
        return shard_like(value, parameter) if getattr(value, "shape", None) == parameter.shape else value

    entries = {
        key: {name: sharded(value, parameter) for name, value in state["state"][key].items()}
        for key, parameter in zip(saved, here, strict=True)
        if key in state["state"]
    }
    optimizer.load_state_dict({**state, "state": entries})
