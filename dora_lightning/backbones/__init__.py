"""LightningModules: what is trained."""

from dora_lightning.backbones.backbone import Backbone
from dora_lightning.backbones.llama import DoRALlama

__all__ = ["Backbone", "DoRALlama"]
