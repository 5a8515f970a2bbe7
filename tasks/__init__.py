"""What is asked, and how an answer is judged."""

from tasks.captioning import Captioning
from tasks.commonsense import CommonsenseQA
from tasks.instruction_tuning import InstructionTuning
from tasks.math_qa import MathQA
from tasks.mixed import Mixed
from tasks.nlvr import NLVR
from tasks.video_qa import VideoQA
from tasks.vqa import VQA

__all__ = ["NLVR", "VQA", "Captioning", "CommonsenseQA", "InstructionTuning", "MathQA", "Mixed", "VideoQA"]
