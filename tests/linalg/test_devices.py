"""Where and in which precision weights are decomposed, and what happens when a device fails."""

import warnings

import pytest
import torch

from milora_lightning.linalg import devices
from milora_lightning.linalg.devices import CPU, Way, best_way, decomposing, in_best_way, rate

GPU = torch.device("cuda")
SHAPE = (4096, 11008)


@pytest.fixture
def rates(monkeypatch):
    """Set the rates of a device, and of a CPU that does 10¹¹ operations per second."""
    monkeypatch.setattr(devices, "_slow", set())

    def set_rates(double, single, cpu=1e11):
        known = {("cpu", torch.float64): cpu, ("cuda", torch.float64): double, ("cuda", torch.float32): single}
        monkeypatch.setattr(devices, "rate", lambda device, dtype: known[device.type, dtype])

    return set_rates


@pytest.mark.parametrize(
    ("double", "single", "cpu", "expected"),
    [
        (67e12, 67e12, 1e11, Way(GPU)),  # H100
        (9.7e12, 19.5e12, 1e12, Way(GPU)),  # A100 without its tensor cores
        (1.3e12, 82e12, 1e11, Way(GPU, single=True)),  # RTX 4090
        (0.25e12, 8e12, 1e11, Way(GPU, single=True)),  # T4
        (0.25e12, 8e12, 4e12, Way(CPU)),  # the same beside a large host
        (0.0, 5e12, 1e11, Way(CPU)),  # a device without float64
    ],
)
def test_the_fastest_way_is_taken(rates, double, single, cpu, expected):
    rates(double, single, cpu)
    assert best_way(GPU, SHAPE, 64) == best_way(GPU, SHAPE[::-1], 64) == expected
    assert best_way(CPU, SHAPE, 64) == Way(CPU)


def test_rates_are_measured_and_absent_where_a_device_has_no_float64(monkeypatch):
    rate.cache_clear()
    assert 0 < rate(CPU, torch.float64) < rate(CPU, torch.float32) * 4

    def refuse(*args, **options):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr(torch, "ones", refuse)
    assert rate(torch.device("mps"), torch.float64) == 0


FAILURES = [
    torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.3 GiB"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling `cusolverDnXsyevd_bufferSize`"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_the_cpu_takes_over_where_a_device_fails_and_the_user_is_told(rates, failure):
    rates(67e12, 67e12)

    def decompose(way):
        if way.device.type != "cpu":
            raise failure
        return "decomposed"

    with pytest.warns(UserWarning, match=r"cuda could not decompose a weight of 4096 x 11008 \(.*\): the CPU does it"):
        assert in_best_way(decompose, GPU, SHAPE, 64) == "decomposed"
    with decomposing("layers.3.up"), pytest.warns(UserWarning, match=r"4096 x 11008, that of layer 'layers\.3\.up' \("):
        in_best_way(decompose, GPU, SHAPE, 64)


@pytest.mark.parametrize(
    ("device", "failure"),
    [(GPU, RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")), (CPU, FAILURES[0])],
)
def test_other_errors_are_raised(rates, device, failure, recwarn):
    rates(67e12, 67e12)

    tried = []

    def decompose(way):
        tried.append(way)
        raise failure

    with pytest.raises(RuntimeError, match=str(failure)[:10]):
        in_best_way(decompose, device, SHAPE, 64)
    assert len(tried) == 1  # no other way is tried, and none is promised
    assert not recwarn.list


@pytest.mark.parametrize(("seconds", "moves"), [(300.0, True), (0.5, False)])
def test_a_size_at_which_a_device_crawls_goes_to_the_cpu(rates, monkeypatch, seconds, moves):
    rates(67e12, 67e12)
    clock = iter([0.0, seconds])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_best_way(lambda way: None, GPU, SHAPE, 64)
    assert best_way(GPU, SHAPE, 64) == (Way(CPU) if moves else Way(GPU))
    assert best_way(GPU, (4096, 4096), 64) == Way(GPU)


@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 1024)])
def test_the_next_weights_of_a_slow_size_go_to_the_cpu_as_they_lie_and_transposed(rates, shape):
    rates(67e12, 67e12)
    devices._note_time(GPU, shape, 64, 0.5)
    assert best_way(GPU, shape, 64) == Way(GPU)
    devices._note_time(GPU, shape, 64, 300.0)
    assert best_way(GPU, shape, 64) == best_way(GPU, shape[::-1], 64) == Way(CPU)
    assert best_way(GPU, (4096, 4096), 64) == Way(GPU)
