"""What callbacks and backbones share: adapter checkpoints, parameter groups, start-up checks, merging to a folder."""

from dora_lightning.training.schedules import WarmupDecay

__all__ = ["WarmupDecay"]
