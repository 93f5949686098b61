"""Held-out text as blocks of tokens, for evaluating a language model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from milora_lightning.data.files import Files
from milora_lightning.data.reading.formats import Format
from milora_lightning.utils.errors import InvalidInputError, MissingFileError


class _Texts(Files):
    """A source of texts that does not report which fields were read."""

    def say_read(self, location: str, formats: list[tuple[Format, int]], unread: list[str]) -> None:
        """Report nothing."""


def read_texts(location: str, field: str = "text", split: str = "test") -> list[str]:
    """Read texts.

    Args:
        location: A ``.txt`` file, which is one text; or anything that :class:`milora_lightning.data.Files` reads: a
            JSON, JSON lines or Parquet file or glob, or a Hub name.
        field: Field with the text; not used for ``.txt`` files.
        split: Split of a Hub data set; slices such as ``"test[:1000]"`` work too.

    Returns:
        The texts, without empty ones.

    Raises:
        FileNotFoundError: If there is no such file or Hub data set.
        ValueError: If a row has no such field, or there is no text at all.
    """
    if location.endswith(".txt"):
        path = Path(location).expanduser()
        if not path.is_file():
            raise MissingFileError(f"There is no text file {path.absolute()}. Check the path.")
        try:
            texts = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{path} is not text in UTF-8 ({error}). Convert it.") from error
    else:
        source = _Texts(
            validation=location, prompt_field=field, response_field=field, input_field=None, validation_split=split
        )
        texts = cast("list[str]", source.load("validation")["response"][:])  # type: ignore[index]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InvalidInputError(f"There is no text in {location!r}. Point to a file that is not empty.")
    return texts


def pack(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int) -> Tensor:
    """Tokenize texts, join them with EOS tokens in between, and cut them into blocks of equal length.

    An incomplete last block is dropped. If the tokenizer starts texts with a BOS token, each block starts with it.

    Args:
        texts: The texts.
        tokenizer: A tokenizer.
        length: Tokens in a block.
        max_tokens: Maximum number of tokens in all blocks; the first ones are used.

    Returns:
        Token ids, int64 of shape (blocks, length).

    Raises:
        ValueError: If the texts do not fill a single block.
    """
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    room = length - len(prefix)
    wanted = max_tokens // length
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= wanted * room:
            break
        if tokens and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    blocks = min(len(tokens) // room, wanted)
    if blocks < 1:
        raise InvalidInputError(
            f"The held-out text has {len(tokens)} tokens (at most {max_tokens} are used), which do not fill one block "
            f"of {length}. Give more text, or make the blocks shorter."
        )
    rows = torch.tensor(tokens[: blocks * room]).view(blocks, room)
    return torch.cat([torch.tensor(prefix, dtype=torch.long).expand(blocks, -1), rows], dim=1)
