"""VL-BART's tasks: files -> rows -> batches."""

from datamodules.vl_bart.asked import AskedDataModule
from datamodules.vl_bart.datamodule import VLBartDataModule

__all__ = ["AskedDataModule", "VLBartDataModule"]
