"""Where updates lie in the spectra of their weights."""

from milora_lightning.analysis.spectra import MatrixAnalysis, analyze_model

__all__ = ["MatrixAnalysis", "analyze_model"]
