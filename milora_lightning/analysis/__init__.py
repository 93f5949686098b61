"""Analysis of trained adapters: how their updates relate to the spectra of the weights they update."""

from milora_lightning.analysis.spectra import MatrixAnalysis, analyze_model

__all__ = ["MatrixAnalysis", "analyze_model"]
