"""torchmetrics Metrics: a functional core and a stateful shell each."""

from dora_lightning.metrics.per_source import PerSourceMean, per_source_mean

__all__ = ["PerSourceMean", "per_source_mean"]
