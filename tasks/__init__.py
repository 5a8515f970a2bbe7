"""What is asked, and how an answer is judged."""

from tasks.commonsense import CommonsenseQA

__all__ = ["CommonsenseQA"]
