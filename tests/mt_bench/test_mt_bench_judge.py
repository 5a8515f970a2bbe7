"""Judgments in FastChat's format, from a judge behind a local HTTP server, and the scores that are read from them."""

import json
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from bench_files import QUESTIONS, read_lines_of, write_lines
from tiny import RunCLI

from dora_lightning.mt_bench import judge_answers, read_answers, read_judgments, read_questions, score_table, scores
from dora_lightning.mt_bench.judge import OWN_PROMPTS, read_prompts, read_rating
from dora_lightning.mt_bench.judge_client import chat_client, key_for

Reply = tuple[int, Any]


class FakeJudge:
    """An OpenAI-compatible server; ``reply`` makes (status, body) from the request."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[dict[str, Any]], Reply] = lambda request: says("Fine. Rating: [[7]]")
        self.location = ""
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append(request)
                judge.headers.append(dict(self.headers))
                status, body = judge.reply(request)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if judge.location:
                    self.send_header("Location", judge.location)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.api = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def says(text: Any) -> Reply:
    return 200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def judge() -> Iterator[FakeJudge]:
    server = FakeJudge()
    yield server
    server.close()


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return write_lines(tmp_path / "question.jsonl", QUESTIONS)


def answer_rows(model: str, ids: list[int]) -> list[dict[str, Any]]:
    turns = {number: [f"{model} {number} first {{x}}", f"{model} {number} second"] for number in ids}
    return [
        {"question_id": n, "answer_id": "a", "model_id": model, "choices": [{"index": 0, "turns": t}], "tstamp": 1.0}
        for n, t in turns.items()
    ]


@pytest.fixture
def answers(tmp_path: Path) -> str:
    rows = answer_rows("tiny", [row["question_id"] for row in QUESTIONS])
    return write_lines(tmp_path / "model_answer" / "tiny.jsonl", rows)


@pytest.fixture
def references(tmp_path: Path) -> str:
    return write_lines(tmp_path / "reference_answer" / "gpt-4.jsonl", answer_rows("gpt-4", [111]))


# Ratings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[8]]", 8),
        ("Rating: [[8.5]] and more", 8.5),
        ("[3] at first, in the end [[10]]", 10),  # double brackets win
        ("[[2]] or [[9]]", 2),  # the first counts
        ("Rating: [6]", 6),
        ("Rating: 6", -1),
        ("Rating: [[six]]", -1),
        ("Rating: [[100]]", -1),
        ("Rating: [[10.5]]", -1),
        ("Rating: [[0]]", -1),
        ("Rating: [[1]]", 1),
        ("", -1),
    ],
)
def test_ratings(text: str, rating: float) -> None:
    assert read_rating(text) == rating


# Judging -------------------------------------------------------------------------------------------------------------


def judge_all(judge: FakeJudge, questions: str, answers: str, references: str, file: Path, **options: Any) -> int:
    ask = chat_client(judge.api, "gpt-fake", wait=0.01)
    right = read_answers(references)
    return judge_answers(read_questions(questions), read_answers(answers), right, ask, "gpt-fake", file, **options)


def test_judgments_in_fastchats_format(
    judge: FakeJudge, questions: str, answers: str, references: str, tmp_path: Path
) -> None:
    file = tmp_path / "model_judgment" / "gpt-fake_single.jsonl"
    assert judge_all(judge, questions, answers, references, file) == 12
    rows = read_lines_of(file)
    numbers = [row["question_id"] for row in QUESTIONS]
    assert sorted((row["turn"], row["question_id"]) for row in rows) == [(t, n) for t in (1, 2) for n in numbers]
    for row in rows:
        assert set(row) == {
            "question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"
        }  # fmt: skip
        assert (row["model"], row["judge"][0], row["judgment"], row["score"]) == (
            "tiny",
            "gpt-fake",
            "Fine. Rating: [[7]]",
            7,
        )
    by_place = {(row["turn"], row["question_id"]): row for row in rows}
    assert by_place[1, 81]["judge"][1] == "dora-single"
    assert by_place[2, 111]["judge"][1] == "dora-reference-multi-turn"
    prompt = by_place[1, 81]["user_prompt"]
    assert "is it cold?" in prompt
    assert "tiny 81 first {x}" in prompt
    assert "is it hot?" not in prompt
    prompt = by_place[2, 111]["user_prompt"]
    for part in ("1 or 2?", "tiny 111 first", "2 or 3?", "tiny 111 second", "gpt-4 111 first", "gpt-4 111 second"):
        assert part in prompt
    # the question's own reference
    assert "<correct answer>\na\n</correct answer>" in by_place[1, 101]["user_prompt"]
    for request in judge.requests:
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("gpt-fake", 0, 2048)
        assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert {request["messages"][1]["content"] for request in judge.requests} == {row["user_prompt"] for row in rows}


@pytest.mark.parametrize("workers", [1, 4])
def test_a_refused_request_drops_no_other_judgment(
    judge: FakeJudge, questions: str, answers: str, references: str, tmp_path: Path, workers: int
) -> None:
    other = {"question_id": 81, "model": "other", "judge": ["gpt-fake", "dora-single"], "turn": 1, "score": 3}
    file = Path(write_lines(tmp_path / "judgments.jsonl", [other]))

    def reply(request: dict[str, Any]) -> Reply:
        refused = "what is it?" in request["messages"][1]["content"] and "message 1" not in str(request)
        return (400, {"error": "filtered"}) if refused else says("[[7]]")

    judge.reply = reply
    message = (
        r"^1 of 12 turns have no judgment yet \(question 91, turn 1: .* refused the request: 400 Bad Request: "
        r".*filtered.*\)\. 11 new ones are kept in .*judgments\.jsonl; the same command goes on from there$"
    )
    with pytest.raises(OSError, match=message):
        judge_all(judge, questions, answers, references, file, workers=workers)
    assert len(judge.requests) == 12
    assert len(read_lines_of(file)) == 1 + 11
    with open(file, "a") as cut:
        cut.write('{"question_id": 91, "mod')  # of a process that was killed as it wrote
    judge.reply = lambda request: says("[[8]]")
    assert judge_all(judge, questions, answers, references, file, workers=3) == 1
    rows = read_lines_of(file)
    assert other in rows
    assert sorted(row["score"] for row in rows) == [3, *[7] * 11, 8]
    assert judge_all(judge, questions, answers, references, file) == 0


def test_a_judge_that_refuses_everything_is_not_asked_on(
    judge: FakeJudge, questions: str, answers: str, references: str, tmp_path: Path
) -> None:
    judge.reply = lambda request: (401, {"error": "no such key"})
    with pytest.raises(OSError, match=r"^12 of 12 turns have no judgment yet .*; and \d more\)\. 0 new ones"):
        judge_all(judge, questions, answers, references, tmp_path / "j.jsonl", workers=1)
    assert len(judge.requests) < 8


def test_an_interrupted_run_keeps_what_was_asked_for(
    judge: FakeJudge, questions: str, answers: str, references: str, tmp_path: Path
) -> None:
    def stop(done: int, count: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_all(judge, questions, answers, references, tmp_path / "j.jsonl", workers=4, report=stop)
    assert len(read_lines_of(tmp_path / "j.jsonl")) == len(judge.requests) > 0


def test_a_file_that_cannot_be_written_is_found_before_the_judge_is_asked(
    judge: FakeJudge, questions: str, answers: str, references: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "j.jsonl"):
        with pytest.raises(OSError, match=rf"{place} (is a folder|cannot be written)"):
            judge_all(judge, questions, answers, references, place)
    assert judge.requests == []


def test_fastchats_prompts(judge: FakeJudge, questions: str, answers: str, references: str, tmp_path: Path) -> None:
    texts = {
        "single-v1": "{question}|{answer}",
        "single-math-v1": "{question}|{answer}|{ref_answer_1}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        "single-math-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}|{ref_answer_1}|{ref_answer_2}",
        "pair-v2": "{question}|{answer_a}|{answer_b}",
    }
    rows = [{"name": n, "type": "single", "system_prompt": "Judge.", "prompt_template": t} for n, t in texts.items()]
    prompts = read_prompts(write_lines(tmp_path / "judge_prompts.jsonl", rows))
    file = tmp_path / "judgments.jsonl"
    judge_all(judge, questions, answers, references, file, prompts=prompts)
    by_place = {(row["turn"], row["question_id"]): row for row in read_lines_of(file)}
    assert by_place[1, 111]["judge"] == ["gpt-fake", "single-math-v1"]
    assert by_place[1, 111]["user_prompt"] == "1 or 2?|tiny 111 first {x}|gpt-4 111 first {x}"
    assert by_place[2, 81]["judge"] == ["gpt-fake", "single-v1-multi-turn"]
    assert by_place[2, 81]["user_prompt"] == "is it cold?|tiny 81 first {x}|is it hot?|tiny 81 second"
    with pytest.raises(ValueError, match="lacks the prompts single-math-v1-multi-turn; it has single-v1, single-math"):
        read_prompts(write_lines(tmp_path / "some.jsonl", rows[:3]))


def test_our_prompts_ask_for_a_rating_that_is_read() -> None:
    assert len({prompt.name for prompt in OWN_PROMPTS.values()}) == 4
    for prompt in OWN_PROMPTS.values():
        assert read_rating(prompt.template) == 5


def test_what_is_missing_is_named(judge: FakeJudge, questions: str, answers: str, tmp_path: Path) -> None:
    some = write_lines(tmp_path / "some.jsonl", answer_rows("tiny", [81]))
    with pytest.raises(ValueError, match=r"no answer to question 91 \(roleplay\); answer all of them first"):
        judge_all(judge, questions, some, some, tmp_path / "j.jsonl")
    with pytest.raises(ValueError, match=r"question 111 \(math\) needs 2 reference answers; FastChat's are"):
        judge_all(judge, questions, answers, some, tmp_path / "j.jsonl")
    assert judge.requests == []
    write_lines(tmp_path / "bad.jsonl", [{"question_id": 81, "choices": []}])
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: field 'choices' must be a list of objects"):
        read_answers(tmp_path / "bad.jsonl")


# The client ----------------------------------------------------------------------------------------------------------


def test_a_busy_judge_is_asked_again(judge: FakeJudge) -> None:
    statuses = iter([429, 503, 500])

    def reply(request: dict[str, Any]) -> Reply:
        status = next(statuses, None)
        return (status, {"error": "busy"}) if status else says("[[4]]")

    judge.reply = reply
    assert chat_client(judge.api, "m", key="secret", wait=0.01)("s", "u") == "[[4]]"
    assert len(judge.requests) == 4
    assert judge.headers[0]["Authorization"] == "Bearer secret"
    judge.reply = lambda request: (503, {"error": "busy"})
    with pytest.raises(OSError, match="gave no answer in 2 attempts; the last: 503"):
        chat_client(judge.api, "m", wait=0.01, attempts=2)("s", "u")
    assert "Authorization" not in judge.headers[-1]


def test_a_judge_that_is_not_there_or_no_judge(judge: FakeJudge) -> None:
    judge.reply = lambda request: (200, b"<html>hello</html>")
    with pytest.raises(ValueError, match="answered with no chat completion: '<html>hello"):
        chat_client(judge.api, "m")("s", "u")
    judge.reply = lambda request: says(None)
    with pytest.raises(ValueError, match="answered with no chat completion"):
        chat_client(judge.api, "m")("s", "u")
    with pytest.raises(ValueError, match="api must be an http"):
        chat_client("file:///etc/passwd", "m")
    with pytest.raises(OSError, match=r"gave no answer in 2 attempts; the last: .*refused"):
        chat_client("http://127.0.0.1:9/v1", "m", wait=0.01, attempts=2)("s", "u")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_goes_nowhere_but_to_its_address(judge: FakeJudge, status: int) -> None:
    other = FakeJudge()
    judge.location = f"{other.api}/chat/completions"
    judge.reply = lambda request: (status, {})
    with pytest.raises(OSError, match=rf"sends the request elsewhere, which is not followed: {status}"):
        chat_client(judge.api, "m", key="sk-secret", attempts=1)("s", "u")
    assert other.headers == []
    other.close()


@pytest.mark.parametrize("status", [200, 400, 503])
@pytest.mark.parametrize("chat", [False, True])
def test_a_key_that_is_echoed_is_not_shown(judge: FakeJudge, status: int, chat: bool) -> None:
    def reply(request: dict[str, Any]) -> Reply:
        echo = f"you sent {judge.headers[-1]['Authorization']}"
        return (status, says(echo)[1] if chat else {"error": echo})

    judge.reply = reply
    ask = chat_client(judge.api, "m", key="sk-secret", attempts=1)
    if status == 200 and chat:
        assert ask("s", "u") == "you sent Bearer (key)"
        return
    with pytest.raises((OSError, ValueError)) as caught:
        ask("s", "u")
    assert "you sent Bearer (key)" in str(caught.value)
    assert "sk-secret" not in "".join(traceback.format_exception(caught.value))


def test_where_a_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("OWN_KEY", "own\n")
    assert key_for("https://api.openai.com/v1", None) == "sk-secret"
    for api in ("http://localhost:8000/v1", "https://api.openai.com.evil.org/v1", "https://evil.org/api.openai.com"):
        assert key_for(api, None) is None
        assert key_for(api, "OWN_KEY") == "own"
    for api in ("https://api.openai.com@evil.org/v1", "https://me:pass@evil.org"):
        with pytest.raises(ValueError, match="api holds a user's name or password"):
            key_for(api, None)
    for variable in ("NO_KEY", "BAD_KEY"):
        monkeypatch.setenv("BAD_KEY", "sk-secret\nX: y")
        with pytest.raises(ValueError, match=f"{variable}") as caught:
            key_for("https://api.openai.com/v1", variable)
        assert "secret" not in str(caught.value)
    for api in ("http://api.openai.com/v1", "http://10.0.0.3:8000/v1"):
        with pytest.raises(ValueError, match="is not encrypted, and a key is sent over https alone"):
            chat_client(api, "m", key="own")
        chat_client(api, "m")
    for api in ("http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:80/v1", "https://evil.org"):
        chat_client(api, "m", key="own")


def test_a_key_for_this_machine_goes_through_no_proxy(judge: FakeJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert chat_client(judge.api, "m", key="own", attempts=1)("s", "u") == "Fine. Rating: [[7]]"


def test_fields_of_the_request_can_be_changed(judge: FakeJudge) -> None:
    chat_client(judge.api, "m", request={"max_tokens": None, "max_completion_tokens": 9})("s", "u")
    assert {"model", "temperature", "max_completion_tokens", "messages"} == set(judge.requests[0])


# Scores --------------------------------------------------------------------------------------------------------------


def judgment(model: str, number: int, turn: int, score: float) -> dict[str, Any]:
    return {"question_id": number, "model": model, "judge": ["g", "single-v1"], "turn": turn, "score": score}


def test_means_worked_by_hand(questions: str, tmp_path: Path) -> None:
    rows = [
        judgment("a", 81, 1, 8), judgment("a", 81, 2, 6), judgment("a", 91, 1, 4), judgment("a", 91, 2, -1),
        judgment("b", 81, 1, 9), judgment("b", 81, 2, 9.5), judgment("b", 91, 1, 1), judgment("b", 91, 1, 10),
    ]  # fmt: skip
    first = write_lines(tmp_path / "one.jsonl", rows[:3])
    rest = write_lines(tmp_path / "two.jsonl", rows[3:])
    b, a = scores(read_judgments([first, rest]), read_questions(questions))
    assert (a.model, a.mean, a.rated, a.unrated) == ("a", 6, 3, 1)
    assert a.turns == {1: 6, 2: 6}
    assert (a.categories["writing"], a.categories["roleplay"], a.categories["math"]) == (7, 4, None)
    # the last judgment of an answer counts
    assert (b.model, b.mean, b.turns) == ("b", 9.5, {1: 9.5, 2: 9.5})
    table = score_table([b, a])
    assert [str(column.header) for column in table.columns] == ["", "b", "a"]
    assert [str(cell) for cell in table.columns[2].cells][:3] == ["6.00", "6.00", "6.00"]
    with pytest.raises(ValueError, match="on question 999, which is unknown"):
        scores([judgment("a", 999, 1, 8)], read_questions(questions))


def test_scores_out_of_range_count_as_none(tmp_path: Path) -> None:
    rows = [judgment("a", 81, 1, score) for score in (100,)] + [judgment("a", 81, 2, 4), judgment("a", 91, 1, 0)]
    (result,) = scores(read_judgments([write_lines(tmp_path / "j.jsonl", rows)]))
    assert (result.mean, result.rated, result.unrated) == (4, 1, 2)


@pytest.mark.parametrize("change", [{"score": "8"}, {"score": None}, {"turn": "1"}, {"model": 3}])
def test_bad_judgments_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [judgment("a", 81, 1, 8), judgment("a", 81, 2, 8) | change])
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: field '{next(iter(change))}' must be"):
        read_judgments([path])


def test_the_verbs(
    run_cli: RunCLI,
    judge: FakeJudge,
    questions: str,
    answers: str,
    references: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge.reply = lambda request: says("[[8]]" if "first" in request["messages"][1]["content"] else "none")
    run_cli(
        "mt-bench-judge", answers, questions, "org/gpt-fake", "--api", judge.api, "--references", references,
        "--key_variable", "JUDGE_KEY", "--request", '{"seed": 3}',
    )  # fmt: skip
    assert judge.headers[0]["Authorization"] == "Bearer secret"
    assert judge.requests[0]["seed"] == 3
    file = tmp_path / "model_judgment" / "org_gpt-fake_single.jsonl"
    assert len(read_lines_of(file)) == 12
    capsys.readouterr()
    run_cli("mt-bench-scores", file)
    assert "turn 2" in capsys.readouterr().out
    run_cli("mt-bench-scores", f"[{file}, {file}]", "--questions", questions, "--output", tmp_path / "scores.json")
    printed = capsys.readouterr().out
    assert "tiny" in printed
    assert "8.00" in printed
    (saved,) = json.loads((tmp_path / "scores.json").read_text())
    assert (saved["model"], saved["mean"], saved["turns"]) == ("tiny", 8, {"1": 8, "2": 8})
    assert saved["categories"]["writing"] == 8
