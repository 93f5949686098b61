"""Modes of modules are put back one by one."""

from __future__ import annotations

import pytest
from torch import nn

from milora_lightning.utils.modes import eval_mode


def test_each_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout())).train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before
    model.eval()
    with eval_mode(model):
        pass
    assert not any(module.training for module in model.modules())
