"""Whatever JSON value stands in whatever field: a sample, or one error that names file and row."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.commonsense_rows import TASKS, parse_hub_row
from datamodules.conversation import get_conversation_template
from datamodules.instructions import InstructionDataModule
from datamodules.llava import conversation_turns
from datamodules.math_qa import _sample as math_sample
from datamodules.messages import dialogue_of_row
from datamodules.moving_shapes_files import read_moving_shapes
from datamodules.preferences import PreferenceDataModule
from datamodules.rows import convert_file, convert_rows
from datamodules.vl_bart.image_rows import read_coco_captions, read_gqa, read_nlvr2, read_vqav2
from datamodules.vl_bart.image_sets import COCOCaptionFiles, GQAFiles, NLVR2Files, VQAv2Files
from datamodules.vl_bart.value_rows import read_captions, read_subtitles, read_video_qa
from datamodules.vl_bart.value_sets import VALUEFiles
from datamodules.vl_bart.value_text import value_asked
from datamodules.vqa_choice_files import read_pope, read_scienceqa
from datamodules.vqa_files import read_gqa as read_gqa_questions
from datamodules.vqa_files import read_textvqa, read_vizwiz
from datamodules.vqa_files import read_vqav2 as read_vqav2_questions
from datamodules.vqa_rows import mmbench
from datamodules.vqa_sets import EvaluationSet
from dora_lightning.analyzing.records import read_records
from dora_lightning.data import Sample
from dora_lightning.mt_bench import read_answers, read_judgments, read_questions
from dora_lightning.mt_bench.judge import read_prompts
from dora_lightning.offline.commands import _read_prompts
from tasks.submissions import read_question_ids

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**20, -(10**299), "<long>", 1e300, -0.0, float("nan"), float("inf"), 0.5]),
    st.sampled_from(["", " ", "0", "x" * 5000, "half \ud83d", "\x00", "a/../b", "[/]", "{0}", "nan", "train", "yes"]),
    st.text(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=2)),
    max_leaves=5,
)
DEEP: Any = "deep"
for _ in range(120):
    DEEP = [DEEP]

Reader = Callable[[Path, str], Any]
QA = {
    "instruction": "Which? Answer format: answer1/answer2",
    "input": "",
    "output": "it is answer1",
    "answer": "answer1",
}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
HUB_ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it", "answer": True},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    "social_i_qa": {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"},
    "hellaswag": {"activity_label": "l", "ctx": "c", "endings": ["a", "b"], "label": "1"},
    "winogrande": {"sentence": "s _", "option1": "a", "option2": "b", "answer": "1"},
    "ARC-Challenge": {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "ARC-Easy": {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
    "openbookqa": {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
}
VIDEO = {"vid_name": "v", "qid": 1, "q": "what?", "a0": "a", "a1": "b", "answer_idx": 1, "ts": "0.5-2"}
CLIP = {"vid_name": "v", "clip_id": 1, "duration": 9.5, "ts": [0.5, 2], "descs": [{"desc": "a cat"}]}


def _convert(convert: Callable[[dict[str, Any]], Any]) -> Reader:
    return lambda path, _: convert_file(path, convert)


def _file(read: Callable[[Path], Any]) -> Reader:
    return lambda path, _: read(path)


def _where(path: Path, **more: Any) -> EvaluationSet:
    return EvaluationSet(questions=str(path), images=str(path.parent / "images"), **more)


def _sampled(questions: Any) -> list[Sample]:
    return [question.sample(get_conversation_template("vicuna_v1")) for question in questions]


def _asked(read: Any, **more: Any) -> Reader:
    return lambda path, _: _sampled(read(_where(path, **more), "raise"))


def _pope(path: Path, _: str) -> Any:
    return _sampled(read_pope(_where(path.rename(path.with_name("coco_pope_random.json"))), "raise"))


def _instruction(path: Path, tokenizer: str) -> Any:
    return InstructionDataModule(tokenizer, train_file=str(path), template="alpaca").build_samples("train")


def _preference(path: Path, tokenizer: str) -> Any:
    return PreferenceDataModule(tokenizer, train_file=str(path), template="none").build_samples("train")


def _commonsense(path: Path, tokenizer: str) -> Any:
    from datamodules import CommonsenseDataModule

    return CommonsenseDataModule(tokenizer, train_file=str(path), val_size=0).build_samples("train")


def _hub(task: str) -> Reader:
    return lambda path, _: convert_file(path, lambda row: parse_hub_row(row, task))


def _llava(path: Path, _: str) -> Any:
    from datamodules.llava import LlavaInstructions

    data = LlavaInstructions("no-model", train_file=str(path))
    data.template = get_conversation_template("vicuna_v1")
    return data.build_samples("train")


def _judge_prompts(path: Path, _: str) -> Any:
    try:
        return read_prompts(path)
    except ValueError as error:
        if "lacks the prompts" not in str(error):
            raise
        return [error]


def _prompts(path: Path, _: str) -> Any:
    return _read_prompts(path.rename(path.with_suffix(".jsonl")))


def _vlbart(cls: Any, read: Any, **files: Any) -> Reader:
    def reader(path: Path, _: str) -> Any:
        named = {"annotations": path.name} if cls is COCOCaptionFiles else {"train": [path.name]}
        return read(cls(str(path.parent), **(named | files)), "train")

    return reader


def _value(read: Any) -> Reader:
    def reader(path: Path, _: str) -> Any:
        rows = read("own", VALUEFiles(train=str(path), use_subtitles=False), "train")
        return value_asked(rows, training=False)

    return reader


def _moving(path: Path, _: str) -> Any:
    folder = path.parent / "train"
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    (folder / "videos" / "v.mp4").touch()
    path.rename(folder / "questions.jsonl")
    return read_moving_shapes(path.parent, "train")


def _ocr(path: Path, _: str) -> Any:
    questions = path.with_name("questions.json")
    questions.write_text('{"data": [{"image_id": "1", "question_id": 2, "question": "q"}]}')
    return read_textvqa(EvaluationSet(str(questions), images=str(path.parent / "images"), ocr=str(path)), "raise")


def _science(path: Path, _: str) -> Any:
    questions = path.with_name("questions.json")
    questions.write_text('{"test": ["0"]}')
    where = EvaluationSet(str(questions), annotations=str(path), images=str(path.parent / "images"))
    return _sampled(read_scienceqa(where, "raise"))


# name -> a good row, what reads a file of rows, and the document's field that holds the rows, if they are no list
READERS: dict[str, tuple[dict[str, Any], Reader, str]] = {
    "commonsense": (QA, _commonsense, ""),
    **{f"hub {task}": (HUB_ROWS[task], _hub(task), "") for task in TASKS},
    "alpaca": ({"instruction": "a", "input": "b", "output": "c"}, _instruction, ""),
    "chat": ({"messages": CHAT}, _instruction, ""),
    "sharegpt": ({"conversations": TURNS}, _convert(dialogue_of_row), ""),
    "math": ({"question": "a", "answer": "b"}, _convert(math_sample), ""),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, _preference, ""),
    "preference chats": (
        {"prompt": CHAT[:1], "chosen": CHAT, "rejected": [CHAT[0], {**CHAT[1], "content": "c"}]},
        _preference,
        "",
    ),
    "llava": ({"id": 1, "image": "a.png", "conversations": TURNS}, _llava, ""),
    "llava turns": ({"conversations": TURNS}, _convert(conversation_turns), ""),
    "vqav2 lines": ({"question_id": 1, "image": "a_1.jpg", "text": "q"}, _asked(read_vqav2_questions), ""),
    "vqav2": ({"question_id": 1, "image_id": 1, "question": "q"}, _asked(read_vqav2_questions), "questions"),
    "gqa": ({"imageId": "1", "question": "q", "answer": "a"}, _asked(read_gqa_questions), "*"),
    "vizwiz": ({"image": "1.jpg", "question": "q", "answers": [{"answer": "a"}]}, _asked(read_vizwiz), ""),
    "textvqa": (
        {"image_id": "1", "question_id": 2, "question": "q", "answers": ["a"]},
        _asked(read_textvqa, ocr_tokens=False),
        "data",
    ),
    "textvqa words": ({"image_id": "1", "ocr_info": [{"word": "a"}]}, _ocr, "data"),
    "scienceqa": ({"question": "q", "choices": ["a", "b"], "answer": 1, "hint": "h", "image": "1.jpg"}, _science, "*"),
    "pope": ({"question_id": 1, "image": "1.jpg", "text": "q", "label": "yes"}, _pope, ""),
    "mmbench": (
        {"index": "1", "question": "q", "A": "a", "B": "b", "answer": "A", "hint": "h"},
        _convert(lambda row: mmbench(row, None)),
        "",
    ),
    "vl-bart vqav2": (
        {"question_id": 1, "img_id": "a_1", "sent": "q", "label": {"a": 1}},
        _vlbart(VQAv2Files, read_vqav2),
        "",
    ),
    "vl-bart gqa": (
        {"question_id": "1", "img_id": "a", "sent": "q", "label": {"a": 1.0}},
        _vlbart(GQAFiles, read_gqa),
        "",
    ),
    "vl-bart nlvr2": (
        {"identifier": "dev-1-0-1", "sent": "s", "img0": "a", "img1": "b", "label": 1, "uid": "u"},
        _vlbart(NLVR2Files, read_nlvr2),
        "",
    ),
    "vl-bart captions": (
        {"split": "train", "filename": "a.jpg", "cocoid": 1, "sentences": [{"raw": "a"}]},
        _vlbart(COCOCaptionFiles, read_coco_captions),
        "images",
    ),
    "video questions": (VIDEO, _value(read_video_qa), ""),
    "clips": (CLIP, _value(read_captions), ""),
    "subtitles": ({"vid_name": "v", "sub": [{"text": "a", "start": 0.5, "end": 1}]}, _file(read_subtitles), ""),
    "moving shapes": (
        {
            "question_id": "1",
            "video": "v",
            "kind": "shape",
            "question": "q",
            "answer": "a",
            "options": ["a"],
            "order": True,
        },
        _moving,
        "",
    ),
    "mt-bench questions": (
        {"question_id": 1, "category": "math", "turns": ["a"], "reference": ["b"]},
        _file(read_questions),
        "",
    ),
    "mt-bench answers": (
        {"question_id": 1, "model_id": "m", "choices": [{"index": 0, "turns": ["a"]}]},
        _file(read_answers),
        "",
    ),
    "mt-bench judgments": (
        {"question_id": 1, "model": "m", "turn": 1, "score": 5, "judge": ["j", "p"]},
        _file(lambda path: read_judgments([path])),
        "",
    ),
    "mt-bench prompts": (
        {"name": "single-v1", "system_prompt": "s", "prompt_template": "{question} {answer}"},
        _judge_prompts,
        "",
    ),
    "generate prompts": ({"prompt": "a"}, _prompts, ""),
    "vqav2 ids": ({"question_id": 1}, _file(read_question_ids), "questions"),
    "learning pattern": (
        {"step": 1, "module": "m", "type": "t", "layer": None, "method": "dora", "delta_m": 0.5, "delta_d": 0.5},
        _file(read_records),
        "",
    ),
}


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Where a value can stand in a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (name,)
        yield from ((name, *rest) for rest in _places(item))


def _changed(row: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(row)
    inside: Any = changed
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = value
    return changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("any")
    for name in ("1.jpg", "a_1.jpg", "COCO_val2014_000000000001.jpg", "0/1.jpg", "1/1.jpg", "00/a"):
        (made / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(made / "images" / name, "PNG")
    return made


def _write(path: Path, rows: list[Any], field: str) -> None:
    content: Any = {str(number): row for number, row in enumerate(rows)} if field == "*" else rows
    text = json.dumps({field: content} if field not in ("", "*") else content)
    # Python itself writes no number of 5,000 digits
    path.write_text(text.replace('"<long>"', "9" * 5000), encoding="utf-8")


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_sample_or_one_error(
    name: str, data: st.DataObject, folder: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    row, read, field = READERS[name]
    place = data.draw(st.sampled_from(list(_places(row))))
    value = data.draw(VALUES | st.just(DEEP))
    path = folder / "rows.json"
    _write(path, [_changed(row, place, value)], field)
    try:
        found = read(path, tokenizer_folder)
    except ValueError as error:
        told = str(error)
        if "none of 1 rows has an answer to train on" not in told:
            assert "rows.json" in told or "questions.jsonl" in told or "rows.jsonl" in told or "coco_pope" in told
            assert any(word in told for word in ("row 1", "line 1", "question 1", "problem 0", "rows.json: ")), told
        assert len(told) < 3000
    else:
        for sample in found if isinstance(found, list) else []:
            for text in (sample.prompt, sample.target) if isinstance(sample, Sample) else ():
                assert isinstance(text, str)
                text.encode()


@pytest.mark.parametrize("name", READERS)
def test_the_good_row_is_read(name: str, folder: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    row, read, field = READERS[name]
    path = folder / "rows.json"
    rows = [row, row] if field == "*" else [row]
    _write(path, rows, field)
    assert read(path, tokenizer_folder)


@pytest.mark.parametrize("value", [0, 1.5, True, [], ["a"], {}, {"a": 1}])
@pytest.mark.parametrize(("name", "field"), [("alpaca", "input"), ("commonsense", "input"), ("scienceqa", "hint")])
def test_what_is_no_text_is_refused_where_a_text_may_be_left_out(
    name: str, field: str, value: Any, folder: Path, tokenizer_folder: str
) -> None:
    row, read, of_document = READERS[name]
    _write(folder / "rows.json", [{**row, field: value}] * 2, of_document)
    with pytest.raises(ValueError, match=f"rows.json.*field '{field}' must be text, found"):
        read(folder / "rows.json", tokenizer_folder)


@pytest.mark.parametrize("choices", ["abc", {"a": 1, "b": 2}, 5, ["a", 1], None])
def test_the_choices_of_scienceqa_are_a_list_of_texts(choices: Any, folder: Path, tokenizer_folder: str) -> None:
    row, read, of_document = READERS["scienceqa"]
    _write(folder / "rows.json", [{**row, "choices": choices}] * 2, of_document)
    with pytest.raises(ValueError, match="field 'choices' must be a list of texts, found"):
        read(folder / "rows.json", tokenizer_folder)


def test_rows_in_memory_are_named_too() -> None:
    with pytest.raises(ValueError, match="the set, row 2: half"):
        convert_rows([{"a": 1}, ValueError("half")], lambda row: row, "the set")
