"""VL-BART: BART that reads visual features beside its text."""

from dora_lightning.vl_bart.model import VLBart, VLBartConfig
from dora_lightning.vl_bart.parts import VLBartParts, load_vl_bart, load_vl_bart_tokenizer, resolve_vl_bart

__all__ = ["VLBart", "VLBartConfig", "VLBartParts", "load_vl_bart", "load_vl_bart_tokenizer", "resolve_vl_bart"]
