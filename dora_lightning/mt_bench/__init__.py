"""MT-Bench: answers to 80 questions of two turns each, and the scores that a judge gives them, in FastChat's files."""

from dora_lightning.mt_bench.answers import answer_questions
from dora_lightning.mt_bench.judge import judge_answers
from dora_lightning.mt_bench.questions import Question, read_answers, read_questions
from dora_lightning.mt_bench.scores import read_judgments, score_table, scores

__all__ = [
    "Question",
    "answer_questions",
    "judge_answers",
    "read_answers",
    "read_judgments",
    "read_questions",
    "score_table",
    "scores",
]
