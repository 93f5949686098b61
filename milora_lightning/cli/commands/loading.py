"""Loading a model for commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora_lightning.data.encoding.asking import check_askable
from milora_lightning.inference import load_for_inference
from milora_lightning.models.processor import DtypeName
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.notices import leave_out_bars


@contextmanager
def loading() -> Iterator[None]:
    """Within this context, show on a terminal (not in a file or a pipe) that a model is being loaded.

    This replaces progress bars of other libraries, which stay on the terminal and write control characters to files.
    """
    leave_out_bars()
    console = Console(stderr=True)
    with console.status("Loading the model") if console.is_terminal else nullcontext():
        yield


def load_to_ask(
    ckpt_path: str | None,
    model: str | None,
    name_or_path: str | None,
    template: str | None,
    dtype: DtypeName | None,
    device: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model named by one of two options; see :func:`milora_lightning.load_for_inference`.

    Raises:
        ValueError: If none or both of the options are given, or no prompt template is known.
    """
    if (ckpt_path is None) == (model is None):
        raise InvalidInputError(
            "Give either --ckpt_path, a checkpoint of fit, or --model, a folder that export wrote or another model."
        )
    path = ckpt_path if ckpt_path is not None else model
    assert path is not None
    with loading():
        loaded, tokenizer = load_for_inference(path, False, device, dtype, name_or_path, template)
    check_askable(tokenizer)
    return loaded, tokenizer
