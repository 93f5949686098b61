"""Comparing methods by their runs: statistics, findings and reports."""
