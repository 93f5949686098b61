"""Data larger than memory and disk, read as it is asked for."""
