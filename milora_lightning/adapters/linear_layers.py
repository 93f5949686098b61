"""Linear layers, torch's and Hugging Face's, told apart without importing transformers.

A model that holds one of transformers' modules has imported it.
"""

from __future__ import annotations

import sys
from typing import TypeGuard

from torch import nn


def is_conv1d(module: object) -> bool:
    """Whether a module is transformers' ``Conv1D``, a linear layer whose weight is (in, out)."""
    layers = sys.modules.get("transformers.pytorch_utils")
    return layers is not None and isinstance(module, layers.Conv1D)


def is_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer, or of a class derived from one.

    >>> is_linear(nn.Linear(2, 2)), is_linear(nn.Bilinear(2, 2, 2))
    (True, False)
    """
    return isinstance(module, nn.Linear) or is_conv1d(module)
