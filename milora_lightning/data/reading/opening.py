"""Opening of text files: decompression, decoding, and clear errors for files that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from milora_lightning.utils.errors import InvalidInputError

COMPRESSED: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda name: pa.input_stream(name, compression="zstd"),
}
MAGIC = {
    b"\x1f\x8b": "is compressed with gzip: unpack it, or let its name end in .gz",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"BZh": "is compressed with bzip2: unpack it, or let its name end in .bz2",
    b"\xfd7zX": "is compressed with xz: unpack it, or let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it, or let its name end in .zst",
    b"PAR1": "is a Parquet file: let its name end in .parquet",
    b"ARRO": "is an Arrow file: let its name end in .arrow",
}


def kind_of(name: str | Path) -> str:
    """Return the suffix of a file's name that indicates its format, ignoring a compression suffix.

    >>> kind_of("a/b.JSONL.gz"), kind_of("a.csv"), kind_of("a.gz"), kind_of("b")
    ('.jsonl', '.csv', '', '')
    """
    ends = [end.lower() for end in Path(name).suffixes[-2:]]
    if ends and ends[-1] in COMPRESSED:
        return ends[0] if len(ends) == 2 else ""
    return ends[-1] if ends else ""


def is_compressed(name: str | Path) -> bool:
    """Return whether a file's name has a compression suffix."""
    return Path(name).suffix.lower() in COMPRESSED


@contextmanager
def open_text(name: str, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text file in UTF-8, with or without a byte order mark.

    Args:
        name: Its path.
        newline: As for :func:`open`.

    Raises:
        ValueError: If the file is of another kind, damaged, or not in UTF-8; also while it is read.
    """
    try:
        with _open_binary(name) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{name} is not text in UTF-8 ({error}). Convert it.") from error
    except (EOFError, lzma.LZMAError, gzip.zlib.error, gzip.BadGzipFile, pa.ArrowException) as error:  # type: ignore[attr-defined]
        raise InvalidInputError(
            f"{name} cannot be unpacked ({type(error).__name__}: {error}). Write it again."
        ) from error
    except OSError as error:
        if not is_compressed(name) or isinstance(error, PermissionError):
            raise
        raise InvalidInputError(f"{name} cannot be unpacked ({error}). Write it again.") from error


def _open_binary(name: str) -> Any:
    if is_compressed(name):
        return COMPRESSED[Path(name).suffix.lower()](name)
    with open(name, "rb") as binary:
        beginning = binary.read(4)
    for magic, what in MAGIC.items():
        if beginning.startswith(magic):
            raise InvalidInputError(f"{name} {what}.")
    return open(name, "rb")
