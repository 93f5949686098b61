"""What an adapted layer may ask of a GPU. Raise a figure only for a reason, and say it in the commit.

For one layer 4096 to 4096, forward and backward, r = 64, 8,192 tokens, bfloat16, as ``benchmarks/launches.py`` counts
it; and for the five adapted layers in each block of a 7B Llama.
"""

from __future__ import annotations

LAUNCHES = {("milora", 0.0): 13, ("milora", 0.05): 16, ("lora", 0.0): 11, ("lora", 0.05): 14}
"""Operations, by start and dropout."""

GIGABYTES = {0.0: 0.91, 0.05: 1.42}
"""Read and written, by dropout; the frozen layer's share is 0.34."""

KEPT_GIGABYTES = 40.0
"""Kept for backward, with dropout or without, of all blocks; the frozen model's share is 34.5."""

HOST_WAITS = 1
"""In a step's loss and gradient: that of transformers, which looks for packed examples in the positions."""
