"""LightningModules: what is trained."""

from dora_lightning.backbones.backbone import Backbone
from dora_lightning.backbones.llama import DoRALlama
from dora_lightning.backbones.llava import DoRALlava
from dora_lightning.backbones.peft_baseline import PeftLlama
from dora_lightning.backbones.preference import DoRALlamaDPO
from dora_lightning.backbones.vl_bart import DoRAVLBart

__all__ = ["Backbone", "DoRALlama", "DoRALlamaDPO", "DoRALlava", "DoRAVLBart", "PeftLlama"]
