from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; a test never waits for a network

from typing import Any

import pytest
import torch

collect_ignore = ["helpers"]


@pytest.fixture
def svd_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that go through torch's SVD."""
    shapes: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def record(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(matrix.shape))
        return svd(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", record)
    return shapes
