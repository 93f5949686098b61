import pytest
import torch
from conftest import TINY_CONFIGS
from torch import Tensor
from transformers import DynamicCache, Gemma2Config
from transformers.cache_utils import DynamicLayer

from milora_lightning.growing_cache import ROOM, GrowingLayer, growing_cache


def tokens(number: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, number, 4), torch.randn(rows, 3, number, 6)  # values may be of another width


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: None,
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_repeat_interleave(1),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.reset(),
    ],
)
def test_holds_what_transformers_layer_holds(change) -> None:
    """Whatever happens to it between two tokens, and whenever it needs more room."""
    ours, theirs = GrowingLayer(), DynamicLayer()
    torch.manual_seed(0)
    for number in (5, 1, 1, ROOM, 1, 2 * ROOM, 1):
        new = tokens(number)
        for one, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        change(ours)
        change(theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_new_token_copies_nothing() -> None:
    layer, theirs = GrowingLayer(), DynamicLayer()
    first, second = (layer.update(*tokens(1))[0].data_ptr() for _ in range(2))
    assert first == second
    first_keys = theirs.update(*tokens(1))[0]
    assert theirs.update(*tokens(1))[0].data_ptr() != first_keys.data_ptr()


def test_rows_made_of_one_do_not_write_into_each_other() -> None:
    layer = GrowingLayer()
    layer.update(*tokens(4, rows=1))
    layer.batch_repeat_interleave(3)
    keys, _ = tokens(1, rows=3)
    assert torch.equal(layer.update(keys, tokens(1, rows=3)[1])[0][:, :, 4:], keys)


def test_layers_with_windows_stay_transformers_own() -> None:
    config = TINY_CONFIGS["gemma2"]
    assert isinstance(config, Gemma2Config)
    kinds = [type(layer) for layer in growing_cache(config).layers]
    assert kinds == [
        GrowingLayer if kind is DynamicLayer else kind for kind in map(type, DynamicCache(config=config).layers)
    ]
    assert GrowingLayer in kinds
    assert len(set(kinds)) == 2
