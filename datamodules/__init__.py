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
from datamodules.conversation import CONVERSATION_TEMPLATES, ConversationTemplate, get_conversation_template
from datamodules.easy_vqa import EasyVQADataModule
from datamodules.encoding import Collator, EncodedDataset, EncodedSample, encode_samples
from datamodules.everyday import EverydayDataModule
from datamodules.everyday_questions import everyday_questions
from datamodules.hub import load_hub_rows
from datamodules.instructions import InstructionDataModule
from datamodules.llava import LlavaInstructions
from datamodules.loading import Stage
from datamodules.math_qa import MathQADataModule
from datamodules.messages import Dialogue, dialogue_of_row, read_messages
from datamodules.packing import PackingCollator, PackingSampler, pack_lengths
from datamodules.preferences import PreferenceDataModule
from datamodules.resuming import ResumableDataLoader, resume_sampler
from datamodules.rows import OnBadRow, Row, convert_file, convert_rows, read_rows, require_field
from datamodules.sampling import LengthGroupedSampler
from datamodules.subsets import split_off
from datamodules.templates import TEMPLATES, PromptTemplate, get_template
from datamodules.text import TextDataModule
from datamodules.video_qa import VideoQADataModule
from datamodules.vision import VisionCollator, VisionDataModule
from datamodules.vl_bart import AskedDataModule, MovingShapesDataModule, VLBartDataModule, VLBartEasyVQADataModule
from datamodules.vqa import VQADataModule
from datamodules.vqa_sets import EvaluationSet
from dora_lightning.data import IGNORE

__all__ = [
    "ARC_OR_OPENBOOKQA",
    "CONVERSATION_TEMPLATES",
    "HUB_IDS",
    "IGNORE",
    "TASKS",
    "TEMPLATES",
    "AskedDataModule",
    "Collator",
    "CommonsenseDataModule",
    "ConversationTemplate",
    "Dialogue",
    "EasyVQADataModule",
    "EncodedDataset",
    "EncodedSample",
    "EvaluationSet",
    "EverydayDataModule",
    "InstructionDataModule",
    "LengthGroupedSampler",
    "LlavaInstructions",
    "MathQADataModule",
    "MovingShapesDataModule",
    "OnBadRow",
    "PackingCollator",
    "PackingSampler",
    "PreferenceDataModule",
    "PromptTemplate",
    "Question",
    "ResumableDataLoader",
    "Row",
    "Stage",
    "TextDataModule",
    "VLBartDataModule",
    "VLBartEasyVQADataModule",
    "VQADataModule",
    "VideoQADataModule",
    "VisionCollator",
    "VisionDataModule",
    "answer_labels",
    "convert_file",
    "convert_rows",
    "dialogue_of_row",
    "encode_samples",
    "everyday_questions",
    "get_conversation_template",
    "get_template",
    "load_hub_rows",
    "load_hub_split",
    "pack_lengths",
    "parse_hub_row",
    "parse_row",
    "read_messages",
    "read_rows",
    "recognise_task",
    "render_row",
    "require_field",
    "resume_sampler",
    "split_off",
]
