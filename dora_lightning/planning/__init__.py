"""What a run will take: parameters, memory by part, and time, counted from its config without running it."""

from dora_lightning.planning.command import plan

__all__ = ["plan"]
