"""VL-BART's tasks: files -> rows -> batches."""

from datamodules.vl_bart.asked import AskedDataModule
from datamodules.vl_bart.datamodule import VLBartDataModule
from datamodules.vl_bart.easy_vqa import VLBartEasyVQADataModule
from datamodules.vl_bart.moving_shapes import MovingShapesDataModule

__all__ = ["AskedDataModule", "MovingShapesDataModule", "VLBartDataModule", "VLBartEasyVQADataModule"]
