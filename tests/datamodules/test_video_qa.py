"""Questions about videos for LLaVA, on real encoded files whose frames tell their own time."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from tiny import MakeTrainer
from tiny_llava import save_llava

from datamodules.conversation import get_conversation_template
from datamodules.text import TextDataModule
from datamodules.video_qa import VideoQADataModule, VideoQASet
from dora_lightning.videos import write_video
from dora_lightning.videos.frames import _FramesOfVideo
from tasks.video_qa import VideoQA
from tests.datamodules.conversation_examples import make_bpe, save_llava_processor
from tests.datamodules.vl_bart.value_examples import write_lines, write_value

RATE, SECONDS = 8, 4.0
LETTER = "\nAnswer with the option's letter from the given choices directly."


def save_video(path: Path, seconds: float = SECONDS) -> Path:
    """Grey frames, each lighter than the one before: a frame's level says when it is shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [np.full((32, 32, 3), 20 + 6 * number, dtype=np.uint8) for number in range(int(seconds * RATE))]
    write_video(path, frames, RATE, preset="ultrafast")
    return path


def shown_at(frame: Any) -> float:
    """Seconds at which a frame begins, by its level."""
    return round((float(np.asarray(frame.open(), dtype=np.float64).mean()) - 20) / 6) / RATE


def asked(**changes: Any) -> dict[str, Any]:
    row = {"vid_name": "v", "qid": 7, "q": "What now?", "a0": "One.", "a1": "Two.", "answer_idx": 1, "ts": "1.0-3.0"}
    return {name: value for name, value in {**row, **changes}.items() if value is not None}


def module(datasets: dict[str, VideoQASet], **options: Any) -> VideoQADataModule:
    """A datamodule whose samples are asked for without a model."""
    data = VideoQADataModule("no-model", datasets, **options)
    data.template = get_conversation_template("vicuna_v1")
    return data


@pytest.fixture
def videos(tmp_path: Path) -> str:
    save_video(tmp_path / "videos" / "folder" / "v.mp4")
    return str(tmp_path / "videos")


def own(folder: Path, videos: str, rows: list[dict[str, Any]], **options: Any) -> dict[str, VideoQASet]:
    return {"mine": VideoQASet(train=str(write_lines(folder / "rows.jsonl", rows)), videos=videos, **options)}


def test_frames_in_the_middle_of_equal_parts_of_the_span(tmp_path: Path, videos: str) -> None:
    (sample,) = module(own(tmp_path, videos, [asked()]), frames=4).build_samples("train")
    # parts of half a second from 1 s to 3 s, and a frame lasts an eighth
    assert [shown_at(frame) for frame in sample.images] == [1.25, 1.75, 2.25, 2.75]
    assert sample.row is not None
    assert sample.row["frame_times"] == [1.25, 1.75, 2.25, 2.75]
    assert sample.row["video"].endswith("videos/folder/v.mp4")
    (whole,) = module(own(tmp_path, videos, [asked(ts=None)]), frames=2).build_samples("train")
    assert [shown_at(frame) for frame in whole.images] == [1.0, 3.0]


def test_what_is_asked_and_answered(tmp_path: Path, videos: str) -> None:
    said = [(" Chase : one", 0, 0.9), ("two", 0.5, 1.5), ("three four", 2.9, 3.5), ("five", 3.0, 4.0)]
    subtitles = {"vid_name": "v", "sub": [{"text": text, "start": start, "end": end} for text, start, end in said]}
    path = str(write_lines(tmp_path / "said.jsonl", [subtitles]))
    sets = own(tmp_path, videos, [asked()], subtitles=path)
    (sample,) = module(sets, frames=3).build_samples("train")
    question = f"What now?\nA. One.\nB. Two.{LETTER}"
    assert f"USER: <image><image><image>\nSubtitles: two three four\n{question} ASSISTANT:" in sample.prompt
    assert (sample.target, sample.options) == (" B</s>", (" A</s>", " B</s>"))
    assert (sample.references, sample.source) == (("B",), "mine")
    assert sample.row is not None
    named = {"qid": 7, "vid_name": "v", "ts": "1.0-3.0", "question": "What now?", "choices": ["One.", "Two."]}
    assert {name: sample.row[name] for name in named} == named
    assert sample.row["letters"] is True
    json.dumps(sample.row)

    def spoken(**options: Any) -> str:
        (sample,) = module(sets, frames=1, **options).build_samples("train")
        return sample.prompt.partition("<image>\n")[2].partition("What now?")[0]

    assert spoken(subtitles="all") == "Subtitles: Chase : one two three four five\n"
    assert spoken(subtitles="all", subtitle_words=3) == "Subtitles: Chase : one\n"
    assert spoken(subtitles="none") == ""


def test_values_two_sets(tmp_path: Path) -> None:
    ids = write_value(tmp_path / "ann", rows=6, duration=SECONDS)
    for source in ("tvqa", "how2qa"):
        for name in ids[source]:
            save_video(tmp_path / source / f"{name}.mp4")
    sets = {name: VideoQASet(str(tmp_path / "ann"), videos=str(tmp_path / name)) for name in ("tvqa", "how2qa")}
    data = module(sets, frames=2)
    samples = {stage: data.build_samples(stage) for stage in ("train", "validate", "test")}  # type: ignore[arg-type]
    assert {stage: len(of_stage) for stage, of_stage in samples.items()} == {"train": 12, "validate": 6, "test": 6}
    # VALUE hides the answers of its test splits
    assert {sample.target for sample in samples["test"]} == {""}
    assert all(sample.target and sample.references for sample in samples["train"] + samples["validate"])
    assert [len(sample.options) for sample in samples["test"]] == [5] * 3 + [4] * 3
    task = VideoQA()
    task.update(samples["validate"], texts=[sample.references[0] for sample in samples["validate"]])
    task.update(samples["test"], texts=["B"] * 6)
    assert float(task.compute()["mean/accuracy"]) == 1
    files = {name: json.loads(content) for name, content in task.files(task.records()).items()}
    assert set(files) == {"tvqa_submission.json", "how2qa_submission.json"}
    assert [files["tvqa_submission.json"][str(122_009 + number)] for number in range(3)] == [1, 1, 1]


def test_limits_are_drawn_by_the_seed(tmp_path: Path, videos: str) -> None:
    rows = [asked(qid=number) for number in range(12)]

    def drawn(**options: Any) -> list[int]:
        return [sample.row["qid"] for sample in module(own(tmp_path, videos, rows), **options).build_samples("train")]  # type: ignore[index]

    assert drawn() == list(range(12))
    few, more = drawn(limit_train=3), drawn(limit_train=6)
    assert few == sorted(few)
    assert set(few) < set(more)
    assert drawn(limit_train=3, seed=1) != few
    assert drawn(limit_eval=3) == list(range(12))


def test_shuffled_frames_are_the_same_in_another_order(tmp_path: Path, videos: str) -> None:
    rows = [asked(qid=number) for number in range(8)]
    ordered = module(own(tmp_path, videos, rows)).build_samples("train")
    shuffled = module(own(tmp_path, videos, rows), shuffle_frames=True).build_samples("train")
    orders = []
    for plain, other in zip(ordered, shuffled, strict=True):
        times = [shown_at(frame) for frame in other.images]
        assert sorted(times) == [shown_at(frame) for frame in plain.images]
        assert (other.prompt, other.target) == (plain.prompt, plain.target)
        orders.append(tuple(times))
    # eight frames have 40,320 orders: each row has its own, and none is the true one
    assert len({*orders, tuple(sorted(orders[0]))}) == 9
    again = module(own(tmp_path, videos, rows), shuffle_frames=True, limit_train=3).build_samples("train")
    first = again[0].row
    assert first is not None
    assert tuple(shown_at(frame) for frame in again[0].images) == orders[first["qid"]]
    other_seed = module(own(tmp_path, videos, rows), shuffle_frames=True, seed=1).build_samples("train")
    assert tuple(shown_at(frame) for frame in other_seed[0].images) != orders[0]


def broken(tmp_path: Path, videos: str) -> list[tuple[dict[str, Any], str]]:
    """Rows that cannot be used, and what is said of them."""
    folder = Path(videos)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video " * 200)
    content = save_video(tmp_path / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 3])
    save_video(folder / "one" / "twice.mp4")
    save_video(folder / "two" / "twice.mp4")
    return [
        (asked(vid_name="none"), f"no video 'none' in {folder}; expected a file of that name, such as none.mp4"),
        (asked(vid_name="twice"), "two files for the video 'twice': .*one/twice.mp4 and .*two/twice.mp4"),
        (asked(vid_name="empty"), ".*empty.mp4: the file is empty"),
        (asked(vid_name="text"), ".*text.mp4: not a video"),
        (asked(vid_name="cut"), ".*cut.mp4: "),
        (asked(ts="2.0-2.0"), "field 'ts' is a span of no length, from 2.0 s to 2.0 s"),
        (asked(ts="2.0-4.3"), "field 'ts' ends at 4.3 s, after the end of .*v.mp4, which is 4.000 s long"),
        (asked(ts="4.0-4.1"), "field 'ts' ends at 4.1 s, after the end of"),
        (
            asked(**{f"a{number}": "x" for number in range(27)}),
            "expected at most 26 choices, one for each letter, found 27",
        ),
    ]


def test_bad_rows_stop_the_run(tmp_path: Path, videos: str) -> None:
    for row, message in broken(tmp_path, videos):
        with pytest.raises(ValueError, match=f"mine, qid 7: {message}"):
            module(own(tmp_path, videos, [asked(qid=1), row])).build_samples("train")


def test_bad_rows_are_left_out_and_counted(tmp_path: Path, videos: str) -> None:
    rows = [row for row, _ in broken(tmp_path, videos)]
    data = module(own(tmp_path, videos, [*rows, asked(qid=1)]), on_bad_row="skip")
    with pytest.warns(
        UserWarning, match="9 of 10 samples were skipped for their videos; the first: mine, qid 7: no vid"
    ):
        (sample,) = data.build_samples("train")
    assert sample.row is not None
    assert sample.row["qid"] == 1
    data = module(own(tmp_path, videos, rows), on_bad_row="skip")
    with pytest.raises(ValueError, match="9 of 9 samples were skipped"):
        data.build_samples("train")


def test_a_span_may_end_a_little_after_the_video(tmp_path: Path, videos: str) -> None:
    (sample,) = module(own(tmp_path, videos, [asked(ts="2.0-4.2")]), frames=4).build_samples("train")
    assert [shown_at(frame) for frame in sample.images] == [2.25, 2.75, 3.25, 3.75]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from dora_lightning.videos import frames as library

    seen: list[Any] = []
    read = library.read_frames
    monkeypatch.setattr(library, "read_frames", lambda path, times: seen.append((path, times)) or read(path, times))
    _FramesOfVideo._kept.clear()
    return seen


def processor(folder: Path) -> str:
    folder.mkdir()
    return save_llava_processor(folder, make_bpe())


def test_batches_hold_all_frames(tmp_path: Path, videos: str, reads: list[Any]) -> None:
    sets = own(tmp_path, videos, [asked(qid=number, ts=f"0.{number}-3.0") for number in range(4)])
    model = processor(tmp_path / "model")
    data = VideoQADataModule(model, sets, frames=3, batch_size=2, cutoff_len=512, num_workers=0)
    data.setup("fit")
    reads.clear()
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        assert batch["vision"]["pixel_values"].shape == (6, 3, 32, 32)
        # 16 tokens in place of each frame, none of them trained on
        assert (batch["input_ids"] == data._image_token_id).sum(1).tolist() == [48, 48]
        text = data.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])  # type: ignore[union-attr]
        assert text.strip() == "B</s>"
        # later frames are lighter
        levels = batch["vision"]["pixel_values"].mean((1, 2, 3)).view(2, 3)
        assert bool((levels.diff(dim=1) > 0).all())
    # the frames of a sample are decoded together
    assert len(reads) == 4
    assert {len(times) for _, times in reads} == {3}


def test_workers_open_frames(tmp_path: Path, videos: str) -> None:
    sets = own(tmp_path, videos, [asked(qid=number) for number in range(2)])
    model = processor(tmp_path / "model")
    data = VideoQADataModule(model, sets, frames=2, batch_size=1, cutoff_len=512, num_workers=1)
    data.setup("fit")
    assert [len(batch["vision"]["pixel_values"]) for batch in data.train_dataloader()] == [2, 2]


def test_frames_that_do_not_fit(tmp_path: Path, videos: str) -> None:
    data = VideoQADataModule(processor(tmp_path / "model"), own(tmp_path, videos, [asked()]), cutoff_len=100)
    with pytest.raises(
        ValueError, match=r"mine: its images and the text before the last of them take .* cutoff_len is 100"
    ):
        data.setup("fit")


def test_data_that_break_off_after_the_header(tmp_path: Path, videos: str) -> None:
    # an index at the front: the header is whole, and the pictures are not
    import av

    path = Path(videos) / "late.mp4"
    noise = torch.randint(0, 256, (32, 64, 64, 3), dtype=torch.uint8, generator=torch.manual_seed(0)).numpy()
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    sets = own(tmp_path, videos, [asked(qid=1), asked(qid=2, vid_name="late", ts="0.0-4.0")])
    options: dict[str, Any] = {"frames": 2, "cutoff_len": 512, "num_workers": 0}
    data = VideoQADataModule(processor(tmp_path / "model"), sets, on_bad_row="skip", **options)
    with pytest.warns(UserWarning, match="1 of 2 samples were skipped for their images; the first: mine: .*late.mp4"):
        data.setup("fit")
    assert len(list(data.train_dataloader())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, found 0"),
        ({"subtitles": "some"}, "subtitles must be 'span', 'all' or 'none', found 'some'"),
        ({"subtitle_words": 0}, "subtitle_words must be at least 1, or null for all, found 0"),
        ({"limit_train": 0}, "limit_train must be at least 1, or null for all, found 0"),
        ({"limit_eval": -1}, "limit_eval must be at least 1, or null for all, found -1"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module({"mine": VideoQASet(videos=str(tmp_path))}, **options)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="datasets: name at least one"):
        module({})
    with pytest.raises(FileNotFoundError, match="videos: no such folder: nowhere"):
        VideoQASet(videos="nowhere")
    data = module({"mine": VideoQASet(videos=str(tmp_path), train=str(tmp_path / "none.jsonl"))})
    # a set of one's own need not have all splits
    assert data.build_samples("test") == []
    with pytest.raises(FileNotFoundError, match=r"mine: train: no such file: .*none.jsonl"):
        data.build_samples("train")
    data = module({"tvqa": VideoQASet(str(tmp_path), videos=str(tmp_path))})
    with pytest.raises(FileNotFoundError, match=r"tvqa: test: no such file: .*tvqa_test_release.jsonl"):
        data.build_samples("test")


def test_trained_and_tested_with_llava(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRALlava

    ids = write_value(tmp_path / "ann", rows=4, duration=SECONDS)
    for name in ids["how2qa"]:
        save_video(tmp_path / "videos" / f"{name}.mp4")
    sets = {"how2qa": VideoQASet(str(tmp_path / "ann"), videos=str(tmp_path / "videos"))}
    llava = str(save_llava(tmp_path / "llava", max_position_embeddings=1024))
    data = VideoQADataModule(llava, sets, frames=2, batch_size=2, cutoff_len=1024, num_workers=0)
    module = DoRALlava(
        llava,
        AdapterConfig(rank=2, target_modules=["q_proj"]),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        task=VideoQA(judge="both", max_new_tokens=2),
    )
    trainer = make_trainer()
    trainer.fit(module, data)
    trainer.test(module, data)
    # the answers of the test split are hidden
    assert not any("accuracy" in name for name in trainer.callback_metrics)
    chosen = json.loads((tmp_path / "how2qa_submission.json").read_text())
    assert list(chosen) == ["30006", "30007"]
    assert all(index in range(4) for index in chosen.values())
    records = [json.loads(line) for line in (tmp_path / "test_predictions.jsonl").read_text().splitlines()]
    assert [len(record["log_likelihoods"]) for record in records] == [4, 4]


def test_from_a_config(tmp_path: Path, videos: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data")
    path = write_lines(tmp_path / "rows.jsonl", [asked()])
    config = tmp_path / "config.yaml"
    text = f"""
data:
  class_path: datamodules.video_qa.VideoQADataModule
  init_args:
    tokenizer: none
    datasets:
      mine: {{train: {path}, videos: {videos}, on_missing_subtitles: empty}}
    frames: 4
"""
    config.write_text(text)
    data = parser.instantiate(parser.parse_path(str(config))).data
    assert data.sets["mine"] == VideoQASet(train=str(path), videos=videos, on_missing_subtitles="empty")
    assert data.frames == 4
    config.write_text(text.replace("on_missing_subtitles", "on_missing_subs"))
    with pytest.raises(ArgumentError, match="on_missing_subs"):
        parser.parse_path(str(config))
