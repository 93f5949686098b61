"""Statistics for starts that depend on data: second moments of layers' inputs, and gradients of frozen weights."""

from milora_lightning.starts import Statistics
from milora_lightning.statistics.collecting import collect_statistics
from milora_lightning.statistics.ranks import ranks_by_variance

__all__ = ["Statistics", "collect_statistics", "ranks_by_variance"]
