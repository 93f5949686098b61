"""FSDP2: checkpoints of sharded adapters, as one file or one folder, that any number of ranks can load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from milora_lightning.checkpoint.adapter import AdapterCheckpoint
from milora_lightning.checkpoint.io import KEY, read
from milora_lightning.parallel.dtensor import shard_like
from milora_lightning.parallel.work import raise_on_all_ranks
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import replace_by
from milora_lightning.utils.names import unwrapped_name


class MiLoRAModelParallelStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, ``milora_fsdp2``, whose checkpoints hold adapters and other trained weights.

    Args:
        data_parallel_size: Number of devices to shard the weights over; ``"auto"`` for all of them.
        tensor_parallel_size: Must be 1: adapters do not support tensor parallelism.
        save_distributed_checkpoint: Whether each rank writes its shards, into a folder; otherwise one file is written.
        **kwargs: Further arguments of ``ModelParallelStrategy``.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        save_distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, **kwargs)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the name ``milora_fsdp2``."""
        strategy_registry.register("milora_fsdp2", cls, description=cls.__doc__, override=True)

    def setup_environment(self) -> None:
        """Connect the processes and create the device mesh."""
        if self._data_parallel_size == "auto" and self._tensor_parallel_size == 1:
            # Lightning's default is one for each node
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def check(self) -> None:
        """Refuse settings that do not work with adapters.

        Raises:
            ValueError: If there is such a setting.
        """
        size = self.device_mesh["tensor_parallel"].size()
        if size > 1:
            raise InvalidInputError(
                f"tensor_parallel_size is {size}, and tensor parallelism splits the layers that have adapters, but not "
                "the adapters' factors: set tensor_parallel_size: 1 and data_parallel_size: "
                f"{self.world_size} in {type(self).__name__}."
            )
        if self.precision_plugin.precision == "16-mixed":
            raise InvalidInputError(
                "precision 16-mixed scales gradients, which FSDP2 does not do: set precision: bf16-mixed."
            )

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
            super().save_checkpoint(checkpoint, filepath, storage_options)  # which replaces a file atomically
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
        """Load a checkpoint, a file or a folder, written by any number of ranks; all ranks must call this.

        Every rank reads the whole checkpoint, which holds little more than the adapters, and keeps its shards. The
        checkpoint of a module without adapters is loaded by Lightning.

        Args:
            checkpoint_path: The checkpoint.
            weights_only: Ignored with adapters: only tensors and primitive types are read.

        Returns:
            The content of the checkpoint.

        Raises:
            CheckpointError: If it cannot be read or does not fit the module; nothing is loaded then.
            ValueError: If this happens on another rank.
        """
        module = self.lightning_module
        assert module is not None
        if AdapterCheckpoint.of(module) is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        checkpoint = read_together(self, checkpoint_path)
        _load_module(module, checkpoint["state_dict"], strict=module.strict_loading)
        if module.trainer.state.fn == TrainerFn.FITTING:
            for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
                _load_optimizer(optimizer, state)
        return checkpoint


def read_together(strategy: ParallelStrategy, checkpoint_path: str | Path) -> dict[str, Any]:
    """Read the checkpoint that the first rank names on all ranks; all of them fail if one does.

    Raises:
        CheckpointError: If it cannot be read.
        ValueError: If it cannot be read on another rank.
    """
    path = strategy.broadcast(checkpoint_path)
    checkpoint, error = {}, None
    try:
        checkpoint = read(path)
    except Exception as raised:  # any error, because the other ranks wait for this one
        error = raised
    raise_on_all_ranks(error, strategy.world_size)
    return checkpoint


def _load_module(module: nn.Module, state: dict[str, Any], strict: bool) -> None:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    here = {unwrapped_name(name): tensor for name, tensor in named}
    plain = {unwrapped_name(key): value for key, value in state.items()}
    sharded = {key: shard_like(value, here[key]) if key in here else value for key, value in plain.items()}
    module.load_state_dict(sharded, strict=strict)


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Shard the state of each parameter like the parameter itself.

    Saved parameters have numbers or names, depending on the strategy that saved them; their order is always the same.
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
