"""A start of your own, under its name on the command line: this program is main.py with one start more.

python examples/own_start.py fit --config milora.yaml --adapter.init columns
"""

import torch
from torch import Generator, Tensor

from milora_lightning import register_start
from milora_lightning.__main__ import main


@register_start("columns", version=1)
def columns(weight: Tensor, r: int, statistics: object, generator: Generator) -> tuple[Tensor, Tensor]:
    """Start at the r largest columns of a weight: B holds them, and A picks them."""
    largest = weight.norm(dim=0).topk(r).indices
    A = torch.zeros(r, weight.shape[1], dtype=weight.dtype)
    A[torch.arange(r), largest] = 1
    return A, weight[:, largest]


if __name__ == "__main__":
    main()
