"""A study: a grid of runs from one base config, and the tables and plots that come out."""

from dora_lightning.comparing.command import compare

__all__ = ["compare"]
