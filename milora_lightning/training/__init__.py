"""Optimizer steps: which tokens count, at which rates, going on from what, averaged how."""
