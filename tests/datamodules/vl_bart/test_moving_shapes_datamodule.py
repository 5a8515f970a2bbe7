"""Batches of moving shapes: their sources, frames in order and out of it, what is shared, and the seed."""

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vl_bart import BART, TOWER

pytest.importorskip("av")

from datamodules import MovingShapesDataModule
from dora_lightning.open_clip_tower import CLIP_MEAN, CLIP_STD, OpenClipVision
from dora_lightning.videos import read_frames, sample_times
from dora_lightning.vl_bart import VLBartParts

SIDE = TOWER["image_size"]
TEXT = "what color is the which way does move shape moves came first or circle square triangle"
VIDEOS = {"train_videos": 12, "val_videos": 3, "test_videos": 6}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path_factory.getbasetemp() / "moving-shapes-cache"))


def parts() -> VLBartParts:
    return VLBartParts(BART, tokenizer=TEXT.split(), vision=OpenClipVision(config=TOWER, features="pooled"))


def ready(stage: str, **options: Any) -> MovingShapesDataModule:
    data = MovingShapesDataModule(parts(), **(VIDEOS | {"batch_size": 4} | options))
    data.prepare_data()
    data.setup(stage)
    return data


def pixels_of(path: str, count: int = 8) -> torch.Tensor:
    """Frames as the model is to see them: the middles of equal parts, straight to the square, CLIP's colours."""
    import numpy as np
    from PIL import Image

    frames = [
        np.asarray(frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for frame in read_frames(path, sample_times((0.0, 2.0), count=count))
    ]
    scaled = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255
    return (scaled - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def test_training_batches_are_videos_with_all_their_questions() -> None:
    data = ready("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    rows = data.asked("train")
    questions = Counter(row.visuals[0] for row in rows)
    asked: Counter[str] = Counter()
    for batch in batches:
        paths = [sample.images[0] for sample in batch["samples"]]
        assert dict(Counter(paths)) == {path: questions[path] for path in paths}
        assert len(set(paths)) == 4
        assert {sample.source for sample in batch["samples"]} == {"moving_shapes"}
        vision = batch["vision"]
        assert vision["image_counts"].tolist() == [8] * 4
        assert vision["pixel_values"].shape == (32, 3, SIDE, SIDE)
        for path, place in zip(paths, vision["visual_index"].tolist(), strict=True):
            torch.testing.assert_close(vision["pixel_values"][8 * place : 8 * place + 8], pixels_of(path))
        # the target and nothing else is trained on, as the mean of the rows' means
        for sample, labels in zip(batch["samples"], batch["labels"].tolist(), strict=True):
            assert data.tokenizer is not None
            written = data.tokenizer.decode([token for token in labels if token >= 0])
            assert written == f"<s>{sample.target}</s>"
        assert batch["row_weights"].tolist() == [1.0] * len(paths)
        asked.update(sample.row["question_id"] for sample in batch["samples"])
    assert asked == Counter(row.row["question_id"] for row in rows)
    assert set(asked.values()) == {1}
    assert len(questions) == 12


def test_evaluation_is_of_one_kind_in_a_batch_and_each_question_once() -> None:
    data = ready("fit", eval_batch_size=2)
    batches = list(data.val_dataloader())
    assert all(len({sample.source for sample in batch["samples"]}) == 1 for batch in batches)
    assert max(len(batch["samples"]) for batch in batches) == 2
    rows = Counter(sample.source for batch in batches for sample in batch["samples"])
    assert rows == Counter(row.source for row in data.asked("validate"))
    assert set(rows) == {f"moving_shapes_{kind}" for kind in ("shape", "color", "direction", "first")}
    names = [sample.row["question_id"] for batch in batches for sample in batch["samples"]]
    assert len(set(names)) == len(names)
    for batch in batches:
        for sample in batch["samples"]:
            assert sample.references == (sample.target,)
            assert sample.target in sample.options


def clips_of(data: MovingShapesDataModule) -> dict[tuple[str, str], list[torch.Tensor]]:
    """Question and source -> the frames ``[8, 3, side, side]`` that it is asked about, each time."""
    clips: dict[tuple[str, str], list[torch.Tensor]] = {}
    for batch in data.test_dataloader():
        vision = batch["vision"]
        seen = vision["pixel_values"].split(vision["image_counts"].tolist())
        for row, sample in enumerate(batch["samples"]):
            place = int(vision["visual_index"][row]) if "visual_index" in vision else row
            clips.setdefault((sample.row["question_id"], sample.source), []).append(seen[place])
    return clips


def test_shuffled_frames_are_the_frames_in_another_order_and_the_same_in_each_run() -> None:
    first, again = clips_of(ready("test")), clips_of(ready("test"))
    orders = []
    for (question, source), clips in first.items():
        for clip, same in zip(clips, again[question, source], strict=True):
            assert torch.equal(clip, same)
        if not source.endswith("_shuffled"):
            assert len(clips) == 1
            continue
        (plain,) = first[question, source.removesuffix("_shuffled")]
        there, back = clips  # an order and that backwards
        assert not torch.equal(there, back)
        for clip in clips:
            equal = (clip[:, None] == plain[None]).flatten(2).all(2)  # [shuffled, plain]
            assert equal.any(0).all()
            assert equal.any(1).all()
        assert sorted([there.tolist(), back.tolist()]) == sorted([back.flip(0).tolist(), there.flip(0).tolist()])
        orders.append((there[:, None] == plain[None]).flatten(2).all(2).int().argmax(1).tolist())
    kinds = {source for _, source in first}
    assert {kind for kind in kinds if kind.endswith("_shuffled")} == {
        "moving_shapes_direction_shuffled",
        "moving_shapes_first_shuffled",
    }
    assert len(set(map(tuple, orders))) > 3


def test_kinds_to_shuffle_are_chosen() -> None:
    rows = MovingShapesDataModule(parts(), **VIDEOS, shuffled=("color",)).asked("test")
    again = [row for row in rows if row.shuffle is not None]
    colors = [row for row in rows if row.source == "moving_shapes_color"]
    assert {row.source for row in again} == {"moving_shapes_color_shuffled"}
    assert sorted(row.before for row in again) == sorted(row.before for row in colors * 2)
    assert len({row.shuffle for row in again}) == len(again)
    none = MovingShapesDataModule(parts(), **VIDEOS, shuffled=()).asked("test")
    assert [row for row in rows if row.shuffle is None] == none
    assert all(row.shuffle is None for row in MovingShapesDataModule(parts(), **VIDEOS).asked("validate"))
    with pytest.raises(ValueError, match="shuffled: unknown kind of question 'size'; there are shape, color"):
        MovingShapesDataModule(parts(), shuffled=("size",))


def test_frames_of_a_video_are_as_many_as_asked_for() -> None:
    vision = next(iter(ready("fit", frames=5).train_dataloader()))["vision"]
    assert vision["image_counts"].tolist() == [5] * 4


def test_a_video_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from datamodules.vl_bart import visuals

    decoded: Counter[str] = Counter()
    read = visuals.read_frames

    def counted(path: Any, times: Any) -> Any:
        decoded[str(path)] += 1
        return read(path, times)

    monkeypatch.setattr(visuals, "read_frames", counted)
    data = ready("fit")
    loader: Any = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        list(loader)
    assert len(decoded) == 12
    assert set(decoded.values()) == {1}


def test_the_seed_decides_videos_and_order(tmp_path: Path) -> None:
    def epoch(seed: int, number: int = 0, **options: Any) -> list[list[str]]:
        loader: Any = ready("fit", seed=seed, **options).train_dataloader()
        loader.sampler.set_epoch(number)
        return [[sample.prompt + sample.target for sample in batch["samples"]] for batch in loader]

    assert epoch(1) == epoch(1, data_dir=str(tmp_path))
    assert epoch(1) != epoch(2)
    assert epoch(1) != epoch(1, 1)
    assert sorted(chain(*epoch(1))) == sorted(chain(*epoch(1, 1)))
    made = {path.name for path in tmp_path.iterdir()}
    assert {name.partition("-")[0] for name in made} == {"12", "3", "6"}
    assert all("seed-1-" in name for name in made)
