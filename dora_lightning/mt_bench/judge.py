"""A judge rates each answer by itself, from 1 to 10, and its judgments are written in FastChat's format."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from dora_lightning.files.growing import GrowingFile
from dora_lightning.messages import check_whole
from dora_lightning.mt_bench.judge_client import Ask
from dora_lightning.mt_bench.questions import Question, field, read_lines
from dora_lightning.mt_bench.scores import HIGHEST_RATING, LOWEST_RATING, NO_SCORE, read_judgments

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_IN_SINGLE_BRACKETS = re.compile(r"\[(\d+\.?\d*)\]")


class JudgePrompt(NamedTuple):
    """What a judge is told and asked."""

    name: str
    system: str
    template: str
    """Format string with ``{question}`` and ``{answer}`` of one turn, or ``{question_1}``, ``{answer_1}``,
    ``{question_2}`` and ``{answer_2}``; with ``{ref_answer_1}`` and ``{ref_answer_2}`` where there are references."""


_SYSTEM = "You grade answers of AI assistants. You are strict, fair, and not swayed by how long an answer is."
_TASK = (
    "Grade the assistant's answer{which} below on a scale from 1, useless, to 10, nothing is left to wish for. Ask "
    "whether it does what the user wants, whether it is correct, how deep it goes, and whether it is clear.{check} "
    "First give your reasons in a few sentences. Then end with the grade as a number between double square brackets, "
    "in this form: Rating: [[5]]\n\n"
)
_CHECK = " A correct answer stands beside it: compare the two, and say where the assistant's is wrong."
_LAST = " to the user's second message"
_ONE_TURN = "<question>\n{question}\n</question>\n\n%s<assistant>\n{answer}\n</assistant>"
_TWO_TURNS = (
    "<message 1>\n{question_1}\n</message 1>\n\n<assistant 1>\n{answer_1}\n</assistant 1>\n\n"
    "<message 2>\n{question_2}\n</message 2>\n\n%s<assistant 2>\n{answer_2}\n</assistant 2>"
)
_ONE_REFERENCE = "<correct answer>\n{ref_answer_1}\n</correct answer>\n\n"
_TWO_REFERENCES = (
    "<correct answer 1>\n{ref_answer_1}\n</correct answer 1>\n\n"
    "<correct answer 2>\n{ref_answer_2}\n</correct answer 2>\n\n"
)

# by whether there are references, and by turn; FastChat's names of the four, for a file with its texts
FASTCHAT_NAMES = {
    (False, 1): "single-v1",
    (True, 1): "single-math-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 2): "single-math-v1-multi-turn",
}
OWN_PROMPTS = {
    (False, 1): JudgePrompt("dora-single", _SYSTEM, _TASK.format(which="", check="") + _ONE_TURN % ""),
    (True, 1): JudgePrompt(
        "dora-reference", _SYSTEM, _TASK.format(which="", check=_CHECK) + _ONE_TURN % _ONE_REFERENCE
    ),
    (False, 2): JudgePrompt("dora-multi-turn", _SYSTEM, _TASK.format(which=_LAST, check="") + _TWO_TURNS % ""),
    (True, 2): JudgePrompt(
        "dora-reference-multi-turn", _SYSTEM, _TASK.format(which=_LAST, check=_CHECK) + _TWO_TURNS % _TWO_REFERENCES
    ),
}
"""Prompts of our own. Their scores do not compare with published ones; for those give FastChat's prompts."""


def read_prompts(path: str | Path) -> dict[tuple[bool, int], JudgePrompt]:
    """The four prompts that rate a single answer, from FastChat's ``judge_prompts.jsonl``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no prompt, or one of the four is not there.
    """
    prompts = {prompt.name: prompt for prompt in read_lines(Path(path), _prompt)}
    missing = [name for name in FASTCHAT_NAMES.values() if name not in prompts]
    if missing:
        raise ValueError(f"{path} lacks the prompts {', '.join(missing)}; it has {', '.join(prompts)}")
    return {key: prompts[name] for key, name in FASTCHAT_NAMES.items()}


def read_rating(judgment: str) -> float:
    """The rating in a judgment, or -1: between double square brackets, else between single ones; the first counts.

    What is not from 1 to 10 is no rating.

    >>> read_rating("Good. Rating: [[8]]"), read_rating("Rating: [7.5]"), read_rating("Rating: 7")
    (8, 7.5, -1)
    >>> read_rating("Rating: [[100]]"), read_rating("Rating: [[0]]")
    (-1, -1)
    """
    found = _RATING.search(judgment) or _RATING_IN_SINGLE_BRACKETS.search(judgment)
    if found is None:
        return NO_SCORE
    rating = float(found[1])
    if not LOWEST_RATING <= rating <= HIGHEST_RATING:
        return NO_SCORE
    return rating if "." in found[1] else int(rating)


def judge_answers(
    questions: Sequence[Question],
    answers: Mapping[int, dict[str, Any]],
    references: Mapping[int, dict[str, Any]],
    ask: Ask,
    judge: str,
    file: str | Path,
    prompts: Mapping[tuple[bool, int], JudgePrompt] = OWN_PROMPTS,
    workers: int = 4,
    report: Callable[[int, int], None] = lambda done, count: None,
) -> int:
    """Let a judge rate every turn that ``file`` has no judgment of yet, and add each judgment when it comes.

    A row is ``{"question_id", "model", "judge": [model, prompt], "user_prompt", "judgment", "score", "turn",
    "tstamp"}``, as in FastChat's ``model_judgment/gpt-4_single.jsonl``; the file may hold those of other models.
    The second turn is judged with the first before it. Questions on math, reasoning and coding are judged beside a
    reference: that of the question, or of ``references``.

    A request that fails does not touch the others. Where as many fail in a row as are asked at a time, and at least
    three, no more are sent.

    Args:
        questions: what was asked.
        answers: rows of one model's answers by question.
        references: rows of right answers by question.
        ask: the judge.
        judge: its name in the rows.
        file: where the judgments are and go.
        prompts: what the judge is asked, by whether there are references and by turn.
        workers: judgments asked for at a time.
        report: called with how many turns are judged, and how many there are.

    Returns:
        How many turns were judged now.

    Raises:
        ValueError: an answer or a needed reference is missing, or there are too few workers.
        OSError: the file cannot be written; or, at the end, some turns could not be judged.
    """
    check_whole(1, workers=workers)
    file = Path(file)
    kept = GrowingFile(file)
    rows = read_judgments([file]) if file.is_file() else []
    judged = {_key(row) for row in rows}
    wanted = [row for question in questions for row in _turns(question, answers, references, judge, prompts)]
    open_ones = [(row, system) for row, system in wanted if _key(row) not in judged]
    report(len(wanted) - len(open_ones), len(wanted))

    stopped = Event()

    def rate(row: dict[str, Any], system: str) -> bool:
        if stopped.is_set():
            return False
        judgment = ask(system, row["user_prompt"])
        judged = {**row, "judgment": judgment, "score": read_rating(judgment), "tstamp": time.time()}
        try:
            # here, so that a judgment that was asked for is kept whatever becomes of the main thread
            kept.append(judged)
        except OSError:
            stopped.set()
            raise
        return True

    done, in_a_row, failures = 0, 0, []
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(rate, row, system): row for row, system in open_ones}
        try:
            for future in as_completed(futures):
                try:
                    if not future.result():
                        continue
                except (OSError, ValueError) as error:
                    row = futures[future]
                    failures.append(f"question {row['question_id']}, turn {row['turn']}: {error}")
                    in_a_row += 1
                    if in_a_row >= max(workers, 3):
                        stopped.set()
                    continue
                done, in_a_row = done + 1, 0
                report(len(wanted) - len(open_ones) + done, len(wanted))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        listed = "; ".join(failures[:3]) + (f"; and {len(failures) - 3} more" if len(failures) > 3 else "")
        raise OSError(
            f"{len(open_ones) - done} of {len(wanted)} turns have no judgment yet ({listed}). {done} new ones are kept "
            f"in {file}; the same command goes on from there"
        )
    return done


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["question_id"], row["turn"], tuple(row.get("judge") or ())


def _turns(
    question: Question,
    answers: Mapping[int, dict[str, Any]],
    references: Mapping[int, dict[str, Any]],
    judge: str,
    prompts: Mapping[tuple[bool, int], JudgePrompt],
) -> list[tuple[dict[str, Any], str]]:
    """What is to be judged of one question: rows without a judgment, and what the judge is told."""
    number = question.question_id
    if number not in answers:
        raise ValueError(f"there is no answer to question {number} ({question.category}); answer all of them first")
    row = answers[number]
    given = row["choices"][0]["turns"]
    right: Sequence[str] = question.reference
    if question.needs_reference and not right and number in references:
        right = references[number]["choices"][0]["turns"]
    count = min(2, len(question.turns))
    if len(given) < count or (question.needs_reference and len(right) < count):
        what = "answers" if len(given) < count else "reference answers; FastChat's are reference_answer/gpt-4.jsonl"
        raise ValueError(f"question {number} ({question.category}) needs {count} {what}")
    values = {"question": question.turns[0], "answer": given[0]}
    for turn in range(count):
        values |= {f"question_{turn + 1}": question.turns[turn], f"answer_{turn + 1}": given[turn]}
        if question.needs_reference:
            values[f"ref_answer_{turn + 1}"] = right[turn]
    turns = []
    for turn in range(1, count + 1):
        prompt = prompts[question.needs_reference, turn]
        names = {"question_id": number, "model": row.get("model_id", ""), "judge": [judge, prompt.name]}
        turns.append(({**names, "user_prompt": prompt.template.format(**values), "turn": turn}, prompt.system))
    return turns


def _prompt(row: dict[str, Any]) -> JudgePrompt:
    name, system, template = (field(row, key, str, "text") for key in ("name", "system_prompt", "prompt_template"))
    return JudgePrompt(name, system, template)
