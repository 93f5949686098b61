"""Data larger than memory and disk, read on demand."""
