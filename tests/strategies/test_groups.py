"""How FSDP2's strategy divides the processes, as each of them sees it: the others are imagined."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.testing._internal.distributed.fake_pg import FakeStore

from milora_lightning import MiLoRAModelParallelStrategy
from milora_lightning.models.sharding import Sharding
from milora_lightning.strategies.base import DataRank, data_rank, sharding_of
from milora_lightning.strategies.model_parallel import REPLICATE, SHARD


@contextmanager
def connected(rank: int, ranks: int = 4, **options: Any) -> Iterator[MiLoRAModelParallelStrategy]:
    """The strategy of one of several processes, while they are connected."""
    strategy = MiLoRAModelParallelStrategy(**options)
    strategy.accelerator = CPUAccelerator()
    strategy.parallel_devices = [torch.device("cpu")] * ranks
    strategy.cluster_environment = LightningEnvironment()
    strategy._lightning_module = LightningModule()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with patch.dict(os.environ, LOCAL_RANK=str(rank)):
            strategy.setup_environment()
        yield strategy
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (4, 1)),
        ({"tensor_parallel_size": 2}, (2, 2)),
        ({"data_parallel_size": 1, "tensor_parallel_size": 4}, (1, 4)),
        ({"tensor_parallel_size": "auto"}, (1, 4)),
        ({"data_parallel_replicate_size": 2}, (2, 2, 1)),
        ({"data_parallel_replicate_size": 2, "tensor_parallel_size": 2}, (2, 1, 2)),
        ({"data_parallel_replicate_size": 4, "reshard_after_forward": True}, (4, 1, 1)),
    ],
)
def test_processes_are_divided_as_asked(options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """Batches by the ranks that share them; weights across those of one copy."""
    replicas, tensor = sizes[0] if len(sizes) == 3 else 1, sizes[-1]
    for rank in range(4):
        with connected(rank, **options) as strategy:
            mesh, share = strategy.device_mesh, strategy.distributed_sampler_kwargs
            assert mesh.mesh.shape == sizes
            assert strategy.lightning_module is not None
            assert strategy.lightning_module.device_mesh is mesh
            assert strategy.data_parallel_mesh.ndim == (2 if replicas > 1 else 1)
            assert strategy.data_parallel_mesh.size() == 4 // tensor
            assert share == {"num_replicas": 4 // tensor, "rank": rank // tensor}
            trainer: Any = SimpleNamespace(distributed_sampler_kwargs=share, global_rank=rank, world_size=4)
            assert data_rank(trainer) == DataRank(rank // tensor, 4 // tensor, rank % tensor == 0)


def test_copies_and_shards_are_dimensions_by_name() -> None:
    with connected(0, data_parallel_replicate_size=2) as strategy:
        assert strategy.data_parallel_mesh.mesh_dim_names == (REPLICATE, SHARD)
    with connected(0) as strategy:
        assert strategy.data_parallel_mesh.mesh_dim_names == ("data_parallel",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_replicate_size": 3}, r"data_parallel_replicate_size is 3, .* the 4 ranks"),
        ({"data_parallel_replicate_size": 0}, r"data_parallel_replicate_size is 0, .* the 4 ranks"),
        ({"data_parallel_replicate_size": 2, "tensor_parallel_size": 4}, r"replicate_size is 2, .* the 1 ranks"),
        ({"reshard_after_forward": 3}, r"reshard_after_forward is 3, .* the 4 ranks that share the weights"),
        ({"reshard_after_forward": 4, "data_parallel_replicate_size": 2}, r"forward is 4, .* the 2 ranks that share"),
    ],
)
def test_groups_that_do_not_divide_the_processes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), connected(1, **options):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tensor_parallel_size": 2, "reshard_after_forward": 2},
            "forward: 2 does not work with tensor_parallel_size: 2",
        ),
        ({"param_dtype": "bfloat16"}, "param_dtype: bfloat16 would gather the adapters' factors"),
    ],
)
def test_options_that_adapters_do_not_bear_are_refused(options: dict[str, Any], message: str) -> None:
    with connected(0, **options) as strategy, pytest.raises(ValueError, match=message):
        strategy.check()


def test_gradients_that_are_scaled_are_refused() -> None:
    with connected(0) as strategy:
        strategy.precision_plugin = MixedPrecision("16-mixed", "cpu")
        with pytest.raises(ValueError, match="16-mixed scales gradients"):
            strategy.check()


@pytest.mark.parametrize(
    "options",
    [
        {"reshard_after_forward": 2},
        {"reshard_after_forward": False, "tensor_parallel_size": 2},
        {"reduce_dtype": "float32", "cpu_offload": True},
    ],
)
def test_other_options_pass_and_are_kept(options: dict[str, Any]) -> None:
    with connected(0, **options) as strategy:
        strategy.check()
    own = {name: value for name, value in options.items() if name in vars(Sharding())}
    assert sharding_of(strategy) == Sharding(**own)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, None),
        ({"cpu_offload": True}, "cpu:gloo,cuda:nccl"),
        ({"cpu_offload": True, "process_group_backend": "nccl"}, "nccl"),
    ],
)
def test_what_is_offloaded_is_summed_where_it_is(
    options: dict[str, Any], backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside GPUs, of which this machine has none: what the processes would be connected by."""
    strategy = MiLoRAModelParallelStrategy(**options)
    monkeypatch.setattr(MiLoRAModelParallelStrategy, "root_device", torch.device("cuda:0"))
    asked = []

    class AskedError(Exception):
        pass

    def connect(self: MiLoRAModelParallelStrategy) -> None:
        asked.append(self._process_group_backend)
        raise AskedError

    monkeypatch.setattr(MiLoRAModelParallelStrategy.__base__, "setup_environment", connect)
    strategy.parallel_devices = [torch.device("cuda:0")]
    with pytest.raises(AskedError):
        strategy.setup_environment()
    assert asked == [backend]
