"""A model's answers to MT-Bench's questions, turn by turn, written so that a run that was killed goes on."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dora_lightning.chat_templates import apply_chat_template
from dora_lightning.files import write_text_atomically
from dora_lightning.files.growing import check_writable
from dora_lightning.messages import check_whole
from dora_lightning.mt_bench.questions import Question, read_answers

CHAT, ALPACA, FASTCHAT_ALPACA = "chat", "alpaca", "fastchat_alpaca"
TEMPLATES = (CHAT, ALPACA, FASTCHAT_ALPACA)

_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)

Answer = Callable[..., list[str]]
"""``answer(prompts, **options)`` -> one continuation each; the options are those of ``generate`` of transformers."""


def dialogue_prompt(
    template: str, turns: Sequence[str], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> str:
    """What the model reads before it answers the last of ``turns``.

    Args:
        template: ``chat`` for the tokenizer's chat template; ``alpaca`` for the prompt that Alpaca's rows are trained
            with, a line feed after ``### Response:``; ``fastchat_alpaca`` for that of FastChat's conversation
            ``alpaca``, by which published scores were made.
        turns: the user's messages so far.
        answers: the answers to all of them but the last.
        tokenizer: names the token that ends an answer.

    Raises:
        ValueError: the template is unknown, or the tokenizer has no chat template.
    """
    check_template(template, tokenizer)
    if template == CHAT:
        messages = []
        for number, turn in enumerate(turns):
            messages.append({"role": "user", "content": turn})
            if number < len(answers):
                messages.append({"role": "assistant", "content": answers[number]})
        return apply_chat_template(tokenizer, messages, add_generation_prompt=True)
    prompt = _SYSTEM
    for number, turn in enumerate(turns):
        answer = f"{answers[number]}{tokenizer.eos_token}" if number < len(answers) else None
        if template == ALPACA:
            prompt += f"### Instruction:\n{turn}\n\n### Response:\n" + ("" if answer is None else f"{answer}\n\n")
        else:  # a space before an answer, and nothing between its end and the next instruction
            prompt += f"### Instruction: {turn}\n\n### Response:" + ("" if answer is None else f" {answer}")
    return prompt


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """See whether a model can be asked by a template.

    Raises:
        ValueError: the template is unknown, or the tokenizer has no chat template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    if template == CHAT and tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer has no chat template; choose template {ALPACA} or {FASTCHAT_ALPACA}")


def answer_questions(
    questions: Sequence[Question],
    answer: Answer,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    model_id: str,
    template: str = CHAT,
    max_new_tokens: int = 1024,
    batch_size: int = 8,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, count: None,
) -> int:
    """Answer the questions that ``file`` has no answer to yet, and write it anew after each batch.

    A row is ``{"question_id", "answer_id", "model_id", "choices": [{"index": 0, "turns": [...]}], "tstamp"}`` as in
    FastChat's ``model_answer/{model_id}.jsonl``, and ``settings`` with how it was made. Questions are asked at their
    category's temperature, in batches of one temperature; every batch draws from the same seed, so that a run that
    goes on with the same batch size gives the answers of one that was never stopped.

    Args:
        questions: what is asked, by number.
        answer: continues prompts.
        tokenizer: the model's.
        file: where the answers are and go.
        model_id: the model's name in the rows.
        template: see :func:`dialogue_prompt`.
        max_new_tokens: longest answer to one turn.
        batch_size: questions asked at a time.
        seed: seed of sampling.
        report: called with how many questions are answered, and how many there are.

    Returns:
        How many questions were answered now.

    Raises:
        ValueError: the file holds answers of another model or made in another way.
    """
    check_template(template, tokenizer)
    check_whole(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_whole(0, seed=seed)
    file = Path(file)
    check_writable(file)
    settings = {"template": template, "max_new_tokens": max_new_tokens, "seed": seed}
    rows = read_answers(file) if file.is_file() else {}
    _check_rows(rows, file, {"model_id": model_id, "settings": settings})
    asked = 0
    for batch in _batches(questions, batch_size):
        # a batch is written as a whole, so one that was begun before is done, unless questions were added
        batch = [question for question in batch if question.question_id not in rows]
        if not batch:
            continue
        given = _answer_batch(batch, answer, tokenizer, template, {"max_new_tokens": max_new_tokens}, seed)
        for question, turns in zip(batch, given, strict=True):
            rows[question.question_id] = {
                "question_id": question.question_id,
                "answer_id": uuid.uuid4().hex,
                "model_id": model_id,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
                "settings": settings,
            }
        asked += len(batch)
        lines = (json.dumps(rows[number], ensure_ascii=False) + "\n" for number in sorted(rows))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, "".join(lines))
        report(sum(question.question_id in rows for question in questions), len(questions))
    return asked


def _check_rows(rows: dict[int, dict[str, Any]], file: Path, expected: dict[str, Any]) -> None:
    for row in rows.values():
        for name, value in expected.items():
            if row.get(name) != value:
                raise ValueError(
                    f"{file} holds answers with {name} {row.get(name)!r}, and this run has {value!r}: "
                    "choose another model_id, or remove the file"
                )


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Questions of one temperature together, cut without regard to what is answered already."""
    batches = []
    for temperature in sorted({question.temperature for question in questions}):
        alike = [question for question in questions if question.temperature == temperature]
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    return batches


def _answer_batch(
    batch: Sequence[Question],
    answer: Answer,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    options: dict[str, Any],
    seed: int,
) -> list[list[str]]:
    temperature = batch[0].temperature
    options = {**options, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    torch.manual_seed(seed)
    answers: list[list[str]] = [[] for _ in batch]
    for turn in range(max(len(question.turns) for question in batch)):
        open_ones = [place for place, question in enumerate(batch) if turn < len(question.turns)]
        prompts = [
            dialogue_prompt(template, batch[place].turns[: turn + 1], answers[place], tokenizer) for place in open_ones
        ]
        for place, text in zip(open_ones, answer(prompts, **options), strict=True):
            answers[place].append(text.strip())
    return answers
