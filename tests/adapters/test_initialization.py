"""How weights are decomposed side by side."""

import pytest
import torch
from threadpoolctl import threadpool_info
from torch import nn

from milora_lightning import LoRAConfig, initialize, inject, lora_layers
from milora_lightning.adapters import decomposing, initialization


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(40, 40 + 8 * i) for i in range(6)))


def factors(threads: int) -> list[torch.Tensor]:
    """Return what initialization gives with so many threads, and check that it leaves them as they were."""
    adapted = model()
    inject(adapted, LoRAConfig(r=4))
    before = torch.get_num_threads(), threadpool_info()
    try:
        torch.set_num_threads(threads)
        initialize(adapted, cache=False)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before[0])
    assert threadpool_info() == before[1]
    return [x.detach() for layer in lora_layers(adapted).values() for x in (layer.lora_A, layer.lora_B)]


def test_factors_do_not_depend_on_the_number_of_workers() -> None:
    one = factors(1)
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(one, factors(threads), strict=True))


@pytest.mark.parametrize(("small", "expected"), [(10**9, {1}), (0, {3})])
def test_small_weights_have_one_thread_each_and_large_ones_all(
    monkeypatch: pytest.MonkeyPatch, small: int, expected: set[int]
) -> None:
    seen = set()
    compute = initialization.initial_factors

    def record(*args: object) -> object:
        seen.add(torch.get_num_threads())
        return compute(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(decomposing, "SMALL", small)
    monkeypatch.setattr(initialization, "initial_factors", record)
    factors(3)
    assert seen == expected


@pytest.mark.parametrize("init", ["milora", "random", "lora"])
@pytest.mark.parametrize("threads", [1, 2])
def test_another_default_device_changes_no_factor(init: str, threads: int) -> None:
    def starts(device: str) -> list[torch.Tensor]:
        adapted = model()
        inject(adapted, LoRAConfig(r=4, init=init))
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            with torch.device(device):  # on "meta", what is made without a device has no values
                initialize(adapted, seed=1, cache=False)
        finally:
            torch.set_num_threads(before)
        return [x.detach() for layer in lora_layers(adapted).values() for x in (layer.lora_A, layer.lora_B)]

    for ours, theirs in zip(starts("meta"), starts("cpu"), strict=True):
        assert torch.equal(ours, theirs)


def test_a_failure_beside_others_names_its_layer_and_leaves_the_threads_alone() -> None:
    adapted = model()
    inject(adapted, LoRAConfig(r=4))
    with torch.no_grad():
        lora_layers(adapted)["2"].base_layer.weight[0, 0] = torch.nan
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"layer '2' cannot be decomposed: 1 of the weight's 2240 entries"):
        initialize(adapted, cache=False)
    assert torch.get_num_threads() == threads
    assert not any(layer.initialized for layer in lora_layers(adapted).values())
