"""What is asked, and how an answer is judged."""

from tasks.commonsense import CommonsenseQA
from tasks.vqa import VQA

__all__ = ["VQA", "CommonsenseQA"]
