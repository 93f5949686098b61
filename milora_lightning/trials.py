"""What can be known of a model only by trying it, once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from transformers import PreTrainedModel


def once_per_model(question: Callable[[PreTrainedModel], bool]) -> Callable[[PreTrainedModel], bool]:
    """Decorate a question about a model, so that the answer is found out once and stays with the model.

    >>> asked = []
    >>> question = once_per_model(lambda model: bool(asked.append(model)))
    >>> model = torch.nn.Linear(1, 1)
    >>> question(model), question(model), len(asked)
    (False, False, 1)
    """
    key = f"_answer_of_{question.__name__}"

    @wraps(question)
    def answer(model: PreTrainedModel) -> bool:
        known = getattr(model, key, None)
        if known is None:
            known = question(model)
            setattr(model, key, known)
        return bool(known)

    return answer


def close_logits(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits differ by no more than a model's rounding in a dtype.

    >>> close_logits(torch.ones(3), torch.ones(3) + 1e-3, torch.bfloat16)
    True
    >>> close_logits(torch.ones(3), torch.ones(3) + 1e-3, torch.float32)
    False
    """
    tolerance = max(1e-4, 3 * torch.finfo(dtype).eps)
    return bool((a.float() - b.float()).norm() <= tolerance * a.float().norm())
