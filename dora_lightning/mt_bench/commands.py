"""MT-Bench on the command line: answer the questions, have the answers judged, read the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dora_lightning.backbones.causal_lm import generate_texts
from dora_lightning.files import json_bytes, write_bytes_atomically
from dora_lightning.files.growing import check_writable
from dora_lightning.messages import check_whole
from dora_lightning.mt_bench.answers import CHAT, answer_questions, dialogue_prompt
from dora_lightning.mt_bench.judge import OWN_PROMPTS, judge_answers, read_prompts
from dora_lightning.mt_bench.judge_client import chat_client, key_for
from dora_lightning.mt_bench.questions import read_answers, read_questions
from dora_lightning.mt_bench.scores import read_judgments, score_table, scores
from dora_lightning.offline.models import load_language_model
from dora_lightning.terminal import say
from dora_lightning.training.trained_inputs import differences


def mt_bench(
    model: str,
    questions: str,
    model_id: str | None = None,
    output: str = "model_answer",
    template: str = CHAT,
    base: str | None = None,
    max_new_tokens: int = 1024,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """Answer MT-Bench's questions, both turns, in FastChat's format; goes on where a run was stopped.

    Args:
        model: adapter checkpoint (.ckpt), merged folder, or hub id.
        questions: FastChat's question.jsonl (fastchat/llm_judge/data/mt_bench in its repository).
        model_id: name of the model in the file of answers; by default made of the model's path.
        output: folder of the answers, which are written to {model_id}.jsonl in it.
        template: "chat" for the tokenizer's chat template; "alpaca" for the prompt that Alpaca's rows are trained with;
            "fastchat_alpaca" for that of FastChat's conversation "alpaca", as published.
        base: folder or hub id of an adapter's base model; by default where the run loaded it from.
        max_new_tokens: longest answer to one turn; 1024 as published.
        batch_size: questions answered at a time.
        seed: seed of sampling; the temperature is that of a question's category, as published.
    """
    check_whole(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_whole(0, seed=seed)
    asked = read_questions(questions)
    name = model_id or _model_id(model)
    file = Path(output) / f"{name}.jsonl"
    check_writable(file)
    loaded = load_language_model(model, base)
    network, tokenizer = loaded.network, loaded.tokenizer
    if "prompt" in loaded.trained:
        form = dialogue_prompt(template, ["{prompt}"], [], tokenizer)
        for line in differences(loaded.trained, {"prompt": form}):
            loaded.say(line)

    def answer(prompts: Sequence[str], **options: Any) -> list[str]:
        return generate_texts(network, tokenizer, prompts, **options)

    report = _reporter("answered")
    answered = answer_questions(
        asked, answer, tokenizer, file, name, template, max_new_tokens, batch_size, seed, report
    )
    say(f"Answers: {file} ({answered} of {len(asked)} questions answered now)")


def mt_bench_judge(
    answers: str,
    questions: str,
    judge: str,
    api: str = "https://api.openai.com/v1",
    references: str | None = None,
    prompts: str | None = None,
    output: str | None = None,
    key_variable: str | None = None,
    request: dict[str, Any] | None = None,
    workers: int = 4,
) -> None:
    """Have a judge rate answers to MT-Bench, by any OpenAI-compatible address; goes on where a run was stopped.

    Args:
        answers: a model's answers, model_answer/{model_id}.jsonl.
        questions: FastChat's question.jsonl.
        judge: name of the judging model at that address, such as gpt-4.
        api: the address that /chat/completions stands behind.
        references: right answers to math, reasoning and coding, FastChat's reference_answer/gpt-4.jsonl; not needed
            where the questions have them.
        prompts: FastChat's judge_prompts.jsonl; by default our own prompts, whose scores do not compare with published
            ones.
        output: file of the judgments; by default model_judgment/{judge}_single.jsonl beside the answers' folder.
        key_variable: environment variable with the key of the address, if it wants one; by default OPENAI_API_KEY for
            OpenAI's own address, and no key for any other. It is sent over https alone, or to this machine.
        request: fields of the request to change or add; null leaves one out.
        workers: judgments asked for at a time.
    """
    check_whole(1, workers=workers)
    ask = chat_client(api, judge, key_for(api, key_variable), request)
    name = judge.replace("/", "_")
    file = Path(output) if output else Path(answers).parent.parent / "model_judgment" / f"{name}_single.jsonl"
    judged = judge_answers(
        read_questions(questions),
        read_answers(answers),
        read_answers(references) if references else {},
        ask,
        judge,
        file,
        read_prompts(prompts) if prompts else OWN_PROMPTS,
        workers,
        _reporter("judged"),
    )
    say(f"Judgments: {file} ({judged} turns judged now)")


def mt_bench_scores(judgments: list[str] | str, questions: str | None = None, output: str | None = None) -> None:
    """Print the scores in FastChat's judgment files: per turn, their mean, and per category.

    Args:
        judgments: file of judgments, such as model_judgment/gpt-4_single.jsonl, or a list of files, [a.jsonl, b.jsonl].
        questions: FastChat's question.jsonl, for the scores per category.
        output: JSON file to write the scores to as well.
    """
    files = [judgments] if isinstance(judgments, str) else judgments
    if output is not None:
        check_writable(Path(output))
    results = scores(read_judgments(files), read_questions(questions) if questions else ())
    Console().print(score_table(results))
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(Path(output), json_bytes([result._asdict() for result in results], indent=2) + b"\n")


def _model_id(model: str) -> str:
    """A name for the file of answers: a run's folder for its checkpoint, else the last part of the path or id."""
    path = Path(model)
    if path.suffix == ".ckpt":
        folder = path.resolve().parent
        folder = folder.parent if folder.name == "checkpoints" else folder
        return "-".join(part for part in (folder.parent.name, folder.name, path.stem) if part)
    return model.rstrip("/").rpartition("/")[2].replace(":", "-")


def _reporter(what: str) -> Callable[[int, int], None]:
    def report(done: int, count: int) -> None:
        say(f"{what} {done} of {count}")

    return report
