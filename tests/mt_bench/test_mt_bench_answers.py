"""Answers in FastChat's format, both turns, each category at its temperature, and again after a kill."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_files import QUESTIONS, check_fastchat_answers, read_lines_of, write_lines
from tiny import MakeBackbone, MakeLlama, MakeTrainer, RunCLI, perturb_adapters
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.templates import TEMPLATES as TRAINED
from dora_lightning.mt_bench import answer_questions, read_questions
from dora_lightning.mt_bench.answers import dialogue_prompt

REAL = Path(__file__).parents[3] / "shared" / "data" / "mt_bench" / "question.jsonl"
NUMBERS = [row["question_id"] for row in QUESTIONS]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return write_lines(tmp_path / "question.jsonl", QUESTIONS[::-1])


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


class Model:
    """Writes down what it is asked; its answers depend on the random numbers that are drawn."""

    def __init__(self, kill_at: int = -1) -> None:
        self.kill_at = kill_at
        self.asked: list[tuple[list[str], dict[str, Any]]] = []

    def __call__(self, prompts: Sequence[str], **options: Any) -> list[str]:
        if len(self.asked) == self.kill_at:
            raise KeyboardInterrupt
        self.asked.append((list(prompts), options))
        return [f" answer {int(torch.randint(1000, ()))} " if options["do_sample"] else " greedy " for _ in prompts]


# Questions -----------------------------------------------------------------------------------------------------------


def test_the_published_questions() -> None:
    if not REAL.is_file():
        pytest.skip(f"MT-Bench's questions are not at {REAL}")
    questions = read_questions(REAL)
    assert [question.question_id for question in questions] == list(range(81, 161))
    names = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
    assert [question.category for question in questions] == [name for name in names for _ in range(10)]
    assert {len(question.turns) for question in questions} == {2}
    by_category = {question.category: question.temperature for question in questions}
    assert by_category == dict(zip(names, (0.7, 0.7, 0, 0, 0, 0, 0.1, 0.1), strict=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"question\.jsonl, line 2: broken JSON at column 2"),
        ("[]", r"question\.jsonl, line 2: expected an object, found \[\]"),
        ('{"question_id": "81"}', "line 2: field 'question_id' must be a number, found '81'"),
        ('{"question_id": 1, "category": "math", "turns": []}', "line 2: field 'turns' must be a list of texts"),
        ('{"question_id": 81, "category": "math", "turns": ["q"]}', "question 81 occurs twice"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "question.jsonl"
    write_lines(path, QUESTIONS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file"):
        read_questions(tmp_path / "nowhere.jsonl")


# Prompts -------------------------------------------------------------------------------------------------------------


def test_prompts_of_both_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    below = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    first = dialogue_prompt("alpaca", ["Who?"], [], tokenizer)
    assert first == TRAINED["alpaca"].train_prompt("Who?")  # asked as it was trained
    second = dialogue_prompt("alpaca", ["Who?", "Why?"], ["Me."], tokenizer)
    assert second == first + "Me.</s>\n\n### Instruction:\nWhy?\n\n### Response:\n"
    assert dialogue_prompt("fastchat_alpaca", ["Who?", "Why?"], ["Me."], tokenizer) == (
        f"{below}\n\n### Instruction: Who?\n\n### Response: Me.</s>### Instruction: Why?\n\n### Response:"
    )
    assert dialogue_prompt("chat", ["Who?", "Why?"], ["Me."], tokenizer) == (
        "<s>user: Who?</s><s>assistant: Me.</s><s>user: Why?</s><s>assistant:"
    )


def test_templates_that_cannot_be_had(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="template must be one of chat, alpaca, fastchat_alpaca, got 'vicuna'"):
        dialogue_prompt("vicuna", ["Who?"], [], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template; choose template alpaca"):
        answer_questions([], Model(), tokenizer, "a.jsonl", "a")


# Answers -------------------------------------------------------------------------------------------------------------


def test_temperatures_and_turns(questions: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = Model()
    file = tmp_path / "model_answer" / "tiny.jsonl"
    assert answer_questions(read_questions(questions), model, tokenizer, file, "tiny", "alpaca", 33, batch_size=8) == 6
    check_fastchat_answers(file, NUMBERS)
    options = [options for _, options in model.asked]
    assert options == [
        {"max_new_tokens": 33, "do_sample": False},
        {"max_new_tokens": 33, "do_sample": False},
        *([{"max_new_tokens": 33, "do_sample": True, "temperature": 0.1}] * 2),
        *([{"max_new_tokens": 33, "do_sample": True, "temperature": 0.7}] * 2),
    ]
    first, second = model.asked[4][0], model.asked[5][0]
    assert ["is it cold?" in prompt for prompt in first] == [True, False]
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in read_lines_of(file)}
    assert f"\n{answers[81][0]}</s>\n\n### Instruction:\nis it hot?\n\n" in second[0]
    assert answers[101] == ["greedy", "greedy"]


@pytest.mark.parametrize("kill_at", [0, 1, 3, 6, 7])
def test_a_killed_run_goes_on(questions: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kill_at: int) -> None:
    def answer(folder: str, model: Model) -> list[tuple[int, list[str]]]:
        file = tmp_path / folder / "tiny.jsonl"
        answer_questions(read_questions(questions), model, tokenizer, file, "tiny", batch_size=1)
        check_fastchat_answers(file, NUMBERS)
        return [(row["question_id"], row["choices"][0]["turns"]) for row in read_lines_of(file)]

    whole = Model()
    expected = answer("whole", whole)
    assert len(whole.asked) == 12
    with pytest.raises(KeyboardInterrupt):
        answer("killed", Model(kill_at))
    rest = Model()
    assert answer("killed", rest) == expected
    assert len(rest.asked) == 12 - kill_at // 2 * 2  # a question that lacks its second turn is asked again
    assert answer("killed", Model(0)) == expected  # nothing is left to ask


def test_answers_made_otherwise_are_not_mixed_in(
    questions: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.jsonl"
    answer_questions(read_questions(questions), Model(), tokenizer, file, "tiny")
    with pytest.raises(ValueError, match="holds answers with model_id 'tiny', and this run has 'other'"):
        answer_questions(read_questions(questions), Model(), tokenizer, file, "other")
    with pytest.raises(ValueError, match=r"holds answers with settings .*choose another model_id, or remove the file"):
        answer_questions(read_questions(questions), Model(), tokenizer, file, "tiny", max_new_tokens=8)


# The verb ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(make_backbone: MakeBackbone, make_trainer: MakeTrainer, tmp_path: Path) -> str:
    module = make_backbone()
    module.configure_model()
    perturb_adapters(module)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    path = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    trainer.save_checkpoint(path)
    return str(path)


def test_the_verb(
    run_cli: RunCLI, adapter: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max_new_tokens", 6, "--batch_size", 2)
    run_cli("mt-bench", adapter, questions, *options)
    file = tmp_path / "model_answer" / "runs-version_0-last.jsonl"
    check_fastchat_answers(file, NUMBERS)
    assert "(6 of 6 questions answered now)" in capsys.readouterr().out
    before = file.read_text()
    run_cli("mt-bench", adapter, questions, *options)
    assert "(0 of 6 questions answered now)" in capsys.readouterr().out
    assert file.read_text() == before


def test_the_verb_says_what_is_wrong(run_cli: RunCLI, make_llama: MakeLlama, questions: str) -> None:
    plain = make_llama(chat_template=None)
    with pytest.raises(SystemExit, match="has no chat template; choose template alpaca or fastchat_alpaca"):
        run_cli("mt-bench", plain, questions)
    with pytest.raises(SystemExit, match="nowhere: no such file"):
        run_cli("mt-bench", plain, "nowhere")
