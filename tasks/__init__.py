"""What is asked, and how an answer is judged."""

from tasks.commonsense import CommonsenseQA
from tasks.instruction_tuning import InstructionTuning
from tasks.math_qa import MathQA
from tasks.vqa import VQA

__all__ = ["VQA", "CommonsenseQA", "InstructionTuning", "MathQA"]
