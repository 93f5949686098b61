"""What the lowest versions cannot do, as marks of tests."""

from __future__ import annotations

import pytest
import torch


def beyond_torch_2_6(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.__version__ < (2, 7), reason=f"torch 2.6 {reason}")
