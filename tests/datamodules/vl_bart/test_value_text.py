import pytest

from datamodules.vl_bart.records import Asked, Subtitle, VideoRow
from datamodules.vl_bart.value_text import value_asked

SAID = (Subtitle(" Chase : That's all", 0.8, 1.8), Subtitle("this is?", 1.8, 2.5))
TVQA = VideoRow(
    "tvqa",
    "s03e02_seg02_clip_10",
    (20.16, 25.12),
    "Why is Howard sad?",
    ("Because he is rude.", "He isn't. ", "An argument...", "Meal", "No. 5"),
    2,
    subtitles=SAID,
    row={"qid": 122039, "vid_name": "s03e02_seg02_clip_10", "ts": "20.16-25.12"},
)
TVC = VideoRow(
    "tvc",
    "grey_1",
    (35.73, 40.9),
    captions=("She walks.", "A walk."),
    subtitles=SAID,
    row={"clip_id": 5, "vid_name": "grey_1", "ts": [35.73, 40.9], "duration": 94.03},
)
YC2C = VideoRow("yc2c", "yc_1", captions=("add salt",), subtitles=SAID, row={"clip_id": 6, "vid_name": "yc_1"})


def text(asked: Asked) -> str:
    return asked.before + asked.subtitles + asked.after


def test_published_text_of_a_question() -> None:
    (asked,) = value_asked([TVQA], training=True)
    assert text(asked) == (
        "[Subs]  Chase : That's all this is? [Q] Why is Howard sad? [TS] (20.16-25.12) [Choices] "
        "a0: Because he is rude. a1: He isn't. a2: An argument. a3: Meal. a4: No. 5. tvqa: "
    )
    assert (asked.source, asked.visuals) == ("tvqa", ("s03e02_seg02_clip_10",))
    assert asked.answers == (("a2", 1.0),)
    assert asked.references == ("a2",)
    assert asked.options == ("a0", "a1", "a2", "a3", "a4")
    assert (asked.weighted, asked.mean_by_sample, asked.max_input_tokens) == (False, False, 600)
    assert asked.row == {**TVQA.row, "question": TVQA.question, "choices": list(TVQA.choices)}
    assert asked.subtitles == " Chase : That's all this is?"


def test_published_text_of_four_choices() -> None:
    row = TVQA._replace(source="how2qa", choices=("3.", "4.", "1.", "2."), answer=3, row={"qid": 1, "ts": "0.00-3.57"})
    (asked,) = value_asked([row._replace(subtitles=())], training=False)
    # nothing said leaves two spaces, as VL-Adapter's text has it
    choices = "a0: 3. a1: 4. a2: 1. a3: 2. how2qa: "
    assert text(asked) == f"[Subs]  [Q] Why is Howard sad? [TS] (0.00-3.57) [Choices] {choices}"
    assert asked.options == ("a0", "a1", "a2", "a3")


def test_published_texts_of_clips() -> None:
    (tvc,), (yc2c,) = value_asked([TVC], training=False), value_asked([YC2C], training=False)
    assert text(tvc) == "[Subs]  Chase : That's all this is? [TS] ([35.73, 40.9]) tvc: "
    assert text(yc2c) == "[Subs]  Chase : That's all this is? yc2c: "
    assert tvc.references == ("She walks.", "A walk.")
    assert tvc.answers == (("She walks.", 1.0), ("A walk.", 1.0))
    assert (tvc.max_target_tokens, tvc.max_input_tokens, tvc.options) == (20, 600, ())
    assert tvc.row == TVC.row


def test_one_record_for_each_caption_in_training() -> None:
    asked = value_asked([TVC, YC2C], training=True)
    assert [item.answers for item in asked] == [(("She walks.", 1.0),), (("A walk.", 1.0),), (("add salt", 1.0),)]
    assert [item.references for item in asked[:2]] == [TVC.captions] * 2
    assert text(asked[0]) == text(asked[1])


def test_hidden_answers_are_asked_for_and_not_trained_on() -> None:
    rows = [TVQA._replace(answer=None), TVC._replace(captions=())]
    assert [(item.answers, item.references) for item in value_asked(rows, training=False)] == [((), ())] * 2
    assert value_asked(rows, training=True) == []


def test_without_prompts() -> None:
    asked = value_asked([TVQA, TVC, YC2C], training=False, prompts="none")
    assert [text(item)[-10:] for item in asked] == ["a4: No. 5.", "73, 40.9])", "l this is?"]
    with pytest.raises(ValueError, match="prompts must be 'published' or 'none', found 'vqa: '"):
        value_asked([TVQA], training=False, prompts="vqa: ")  # type: ignore[arg-type]


def test_rows_of_one_video_share_the_text_of_its_subtitles() -> None:
    first, second, other = value_asked([TVQA, TVC, TVQA._replace(subtitles=())], training=False)
    assert first.subtitles is second.subtitles
    assert other.subtitles == ""
