"""Where samples come from: rows -> samples -> batches."""

from datamodules.commonsense import CommonsenseDataModule
from datamodules.commonsense_hub import HUB_IDS, load_hub_split
from datamodules.commonsense_rows import (
    ARC_OR_OPENBOOKQA,
    TASKS,
    Question,
    answer_labels,
    parse_hub_row,
    parse_row,
    recognise_task,
    render_row,
)
from datamodules.easy_vqa import EasyVQADataModule
from datamodules.encoding import Collator, EncodedDataset, EncodedSample, encode_samples
from datamodules.everyday import EverydayDataModule
from datamodules.everyday_questions import everyday_questions
from datamodules.resuming import ResumableDataLoader, resume_sampler
from datamodules.rows import OnBadRow, Row, convert_file, convert_rows, read_rows, require_field
from datamodules.sampling import LengthGroupedSampler
from datamodules.templates import TEMPLATES, PromptTemplate, get_template
from datamodules.text import Stage, TextDataModule
from datamodules.vqa import VQADataModule
from datamodules.vqa_sets import EvaluationSet
from dora_lightning.data import IGNORE

__all__ = [
    "ARC_OR_OPENBOOKQA",
    "HUB_IDS",
    "IGNORE",
    "TASKS",
    "TEMPLATES",
    "Collator",
    "CommonsenseDataModule",
    "EasyVQADataModule",
    "EncodedDataset",
    "EncodedSample",
    "EvaluationSet",
    "EverydayDataModule",
    "LengthGroupedSampler",
    "OnBadRow",
    "PromptTemplate",
    "Question",
    "ResumableDataLoader",
    "Row",
    "Stage",
    "TextDataModule",
    "VQADataModule",
    "answer_labels",
    "convert_file",
    "convert_rows",
    "encode_samples",
    "everyday_questions",
    "get_template",
    "load_hub_split",
    "parse_hub_row",
    "parse_row",
    "read_rows",
    "recognise_task",
    "render_row",
    "require_field",
    "resume_sampler",
]
