"""Private APIs of datasets, read in version 5.2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


def fingerprint_of(dataset: datasets.Dataset) -> str:
    """Return the fingerprint that identifies a dataset's content in the cache of datasets."""
    return str(dataset._fingerprint)
