import io
import json
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conversation_examples import make_bpe, make_llama_tokenizer, save_llava_processor
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from transformers import AutoProcessor

from datamodules import IGNORE, Stage
from datamodules.image_checks import usable_samples
from datamodules.vision import VisionDataModule
from dora_lightning.data import Sample
from dora_lightning.videos import video_frames

BACKGROUND = (127, 102, 76)  # int(255 * mean) of the processors' mean (0.5, 0.4, 0.3)
PER_IMAGE = 16  # (32 / 8) ** 2


class Given(VisionDataModule):
    """Yields the samples that it is given."""

    def __init__(self, tokenizer: str, samples: list[Sample], **options: Any) -> None:
        super().__init__(tokenizer, **{"num_workers": 0, **options})
        self.samples = samples

    def build_samples(self, stage: Stage) -> list[Sample]:
        return self.samples if stage == "train" else []


def batches_of(folder: str, samples: list[Sample], **options: Any) -> list[dict[str, Any]]:
    data = Given(folder, samples, **options)
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llava_processor(tmp_path_factory.mktemp("llava"), make_bpe())


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("next")
    return save_llava_processor(folder, make_llama_tokenizer(folder), next=True)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def squared(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(number: int, images: int, answer: str = " Yes.</s>") -> Sample:
    """Sample ``number`` with so many images, each of a size of its own."""
    pictures = tuple(picture(40 + 8 * (number + place), 20, seed=10 * number + place) for place in range(images))
    prompt = "USER: " + "<image>\n" * images + f"Is it {number}? ASSISTANT:"
    return Sample(prompt, answer, images=pictures, row={"question_id": number})


def with_image(source: Any, **changes: Any) -> Sample:
    return Sample("USER: <image>\nIs it? ASSISTANT:", " Yes.</s>", images=(source,), source="test")._replace(**changes)


@pytest.mark.parametrize("aspect", ["pad", "plain"])
@pytest.mark.parametrize("model", ["llava", "llava_next"])
def test_batches_are_those_of_the_models_own_processor(model: str, aspect: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    samples = [ask(1, 1), ask(2, 2), ask(3, 1), ask(4, 3)]
    (batch,) = batches_of(folder, samples, batch_size=4, image_aspect_ratio=aspect)
    processor = AutoProcessor.from_pretrained(folder)
    for row, sample in enumerate(batch["samples"]):
        images = [squared(image) if aspect == "pad" else image for image in sample.images]
        expected = processor(images=images, text=sample.prompt + sample.target)["input_ids"][0]
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        assert ids == expected
        labels = batch["labels"][row].tolist()
        answer = processor.tokenizer(" Yes.</s>" if model == "llava" else "Yes.</s>", add_special_tokens=False)[
            "input_ids"
        ]
        assert labels[: len(expected)] == [IGNORE] * (len(expected) - len(answer)) + answer
        assert set(labels[len(expected) :]) <= {IGNORE}
    pictures = [squared(i) if aspect == "pad" else i for sample in batch["samples"] for i in sample.images]
    expected = processor.image_processor(images=pictures, return_tensors="pt")
    names = {"pixel_values", "image_sizes"} if model == "llava_next" else {"pixel_values"}
    assert batch["vision"].keys() == expected.keys() == names
    assert type(batch["vision"]) is dict
    for name, values in expected.items():
        assert torch.equal(batch["vision"][name], values)
    assert len(batch["vision"]["pixel_values"]) == 7


def test_images_are_never_trained_on(llava: str) -> None:
    (batch,) = batches_of(llava, [ask(1, 2)], batch_size=1, train_on_inputs=True)
    is_image = batch["input_ids"] == 3
    assert is_image.sum() == 2 * PER_IMAGE
    assert batch["labels"][is_image].eq(IGNORE).all()
    rest = ~is_image & batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][rest], batch["input_ids"][rest])


def test_batches_have_images_in_all_samples_or_in_none(llava: str) -> None:
    samples = [ask(number, number % 3 % 2) for number in range(30)]
    seen = []
    for batch in batches_of(llava, samples, batch_size=4):
        counts = {bool(sample.images) for sample in batch["samples"]}
        assert len(counts) == 1
        assert ("vision" in batch) == counts.pop()
        seen += [sample.prompt for sample in batch["samples"]]
    assert set(seen) == {sample.prompt for sample in samples}


def test_a_batch_of_both_kinds(llava: str) -> None:
    data = Given(llava, [ask(1, 0), ask(2, 1)])
    data.setup("fit")
    batch = data.collator()(data._datasets["train"][[0, 1]])
    assert batch["vision"]["pixel_values"].shape == (1, 3, 32, 32)
    assert batch["input_ids"].eq(3).sum(1).tolist() == [0, PER_IMAGE]


def test_lengths_count_the_tokens_of_images(llava: str) -> None:
    data = Given(llava, [ask(1, 0), ask(1, 2)])
    data.setup("fit")
    text, images = data._datasets["train"].lengths
    placeholders = len(make_bpe()("<image>\n", add_special_tokens=False)["input_ids"]) - 1
    assert images == text + 2 * (PER_IMAGE + placeholders)
    (batch,) = [batch for batch in data.train_dataloader() if "vision" in batch]
    assert batch["attention_mask"].sum(1).tolist() == [images] * 16


@pytest.mark.parametrize("shorter", range(8))
def test_text_is_cut_after_the_last_image(llava: str, shorter: int) -> None:
    (whole,) = batches_of(llava, [ask(1, 2)], batch_size=1)
    end = int(whole["input_ids"][0].eq(3).nonzero().max()) + 1
    length = int(whole["attention_mask"].sum())
    cutoff_len = length - shorter
    longer = ask(1, 2, " Yes. It is. Yes. No. It is red.</s>")
    (batch,) = batches_of(llava, [longer], batch_size=1, cutoff_len=cutoff_len, train_on_inputs=True)
    assert batch["input_ids"].shape == (1, cutoff_len)
    assert batch["input_ids"][0, :end].equal(whole["input_ids"][0, :end])
    assert len(batch["vision"]["pixel_values"]) == 2


def test_images_that_do_not_fit(llava: str) -> None:
    (whole,) = batches_of(llava, [ask(1, 2)], batch_size=1)
    end = int(whole["input_ids"][0].eq(3).nonzero().max()) + 1
    message = f"its images and the text before the last of them take {end} tokens, but cutoff_len is {end - 1}"
    data = Given(llava, [ask(1, 2)], cutoff_len=end - 1)
    with pytest.raises(ValueError, match=f"sample, question 1: {message}"):
        data.setup("fit")
    data = Given(llava, [ask(1, 2), ask(2, 0), ask(3, 2), ask(4, 0)], cutoff_len=end - 1, on_bad_row="skip")
    with pytest.warns(UserWarning, match=f"2 of 4 samples were skipped since their images do not fit; .*: {message}"):
        data.setup("fit")
    assert [item.sample.images for item in data._datasets["train"].encoded] == [(), ()]
    # where the whole image fits but none of the answer does, there is nothing to train on
    data = Given(llava, [ask(1, 2), ask(2, 0)], cutoff_len=end)
    with pytest.warns(UserWarning, match="1 of 2 train samples were left out"):
        data.setup("fit")


def test_every_kind_of_source_gives_the_same_batch(llava: str, tmp_path: Path) -> None:
    image = picture(40, 30)
    image.save(tmp_path / "a.png")
    first, *others = (
        batches_of(llava, [with_image(source)], batch_size=1)[0]["vision"]["pixel_values"]
        for source in (image, png(image), tmp_path / "a.png", str(tmp_path / "a.png"))
    )
    assert all(torch.equal(first, other) for other in others)


def bad_sources(folder: Path) -> dict[str, Any]:
    """Images that cannot be used, by what is said of them."""
    data = png(picture(60, 40))
    (folder / "truncated.png").write_bytes(data[:-900])
    (folder / "text.jpg").write_text("not an image")
    Image.new("RGB", (1, 1)).save(folder / "small.png")
    Image.new("RGB", (20_000, 100)).save(folder / "wide.png")
    return {
        "absent.jpg: no such image": folder / "absent.jpg",
        "text.jpg: not an image": folder / "text.jpg",
        "small.png: too small.*1 x 1": folder / "small.png",
        "wide.png: too large.*20000 x 100": str(folder / "wide.png"),
        "truncated.png: cannot be decoded": folder / "truncated.png",
    }


def test_headers_are_read_before_training(llava: str, tmp_path: Path) -> None:
    row = {"file": "train.json", "row": 7}
    for message, source in bad_sources(tmp_path).items():
        data = Given(llava, [ask(1, 1), with_image(source, row=row)], batch_size=2)
        if "truncated" not in message:
            with pytest.raises(ValueError, match=f"train.json, row 7: .*{message}"):
                data.setup("fit")
        else:
            data.setup("fit")
            with pytest.raises(ValueError, match=f"train.json, row 7: .*{message}"):
                list(data.train_dataloader())


def test_every_bad_image_is_skipped_and_counted(llava: str, tmp_path: Path) -> None:
    bad = [with_image(source) for source in bad_sources(tmp_path).values()]
    # a good image beside a bad one does not save the sample; one bad image in two samples is two bad samples
    two = ask(1, 2)
    bad += [two._replace(images=(two.images[0], tmp_path / "text.jpg")), bad[0]]
    good = [ask(2, 1), ask(3, 0)]
    data = Given(llava, [good[0], *bad, good[1]], on_bad_row="skip", batch_size=1)
    with pytest.warns(
        UserWarning, match=r"7 of 9 samples were skipped for their images; the first: test: .*absent.jpg"
    ):
        data.setup("fit")
    seen = [sample for batch in data.train_dataloader() for sample in batch["samples"]]
    assert sorted(sample.prompt for sample in seen) == sorted(sample.prompt for sample in good)
    with pytest.raises(ValueError, match="7 of 7 samples were skipped"):
        Given(llava, bad, on_bad_row="skip").setup("fit")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (with_image(picture(8, 8), images=()), "found 1 of them and 0 images"),
        (with_image(picture(8, 8), prompt="USER: Is it? ASSISTANT:"), "found 0 of them and 1 images"),
        (with_image(picture(8, 8), prompt="USER: <image><image> ASSISTANT:"), "found 2 of them and 1 images"),
        (with_image(picture(8, 8), target=" See <image>.</s>"), "an answer holds '<image>'"),
        (with_image(picture(8, 8), answered=((0, 20),)), "an answer holds '<image>'"),
    ],
)
def test_as_many_placeholders_as_images(llava: str, sample: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=f"test: .*{message}"):
        Given(llava, [sample]).setup("fit")
    with pytest.warns(UserWarning, match=f"1 of 2 samples were skipped for their images; the first: test: .*{message}"):
        Given(llava, [sample, ask(1, 1)], on_bad_row="skip").setup("fit")


def test_an_image_is_looked_at_once(llava: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from datamodules import image_checks

    looked = []
    monkeypatch.setattr(
        image_checks, "check_image", lambda source, decode, turn: looked.append((source, decode)) or (8, 8)
    )
    shared = picture(8, 8)
    sources = [tmp_path / "a", str(tmp_path / "a"), shared, shared, tmp_path / "b"]
    for on_bad_row in ("raise", "skip"):
        Given(llava, [with_image(source) for source in sources], on_bad_row=on_bad_row).setup("fit")
        assert len(looked) == 3
        assert {decode for _, decode in looked} == {on_bad_row == "skip"}
        looked.clear()


def test_a_placeholder_by_another_name(tmp_path: Path) -> None:
    tokenizer = make_bpe()
    folder = save_llava_processor(tmp_path, tokenizer, image_token="<|im_start|>")
    first = "USER: <image>\nWho? ASSISTANT: Me.</s>USER: <image>\nIs it? ASSISTANT:"
    span = (first.index(" Me."), first.index("USER: <image>\nIs"))
    sample = Sample(first, " No.</s>", images=(picture(8, 8), picture(8, 8)), answered=(span,))
    (batch,) = batches_of(folder, [sample], batch_size=1)
    assert batch["samples"] == [sample]
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORE]) == " Me.</s> No.</s>"
    assert batch["input_ids"].eq(tokenizer.convert_tokens_to_ids("<|im_start|>")).sum() == 2 * PER_IMAGE
    assert batch["input_ids"].eq(tokenizer.convert_tokens_to_ids("<image>")).sum() == 0


@pytest.mark.filterwarnings("ignore:.*use of fork.*|.*multi-threaded.*")
def test_workers_open_the_images(llava: str) -> None:
    samples = [ask(number, number % 3) for number in range(12)]
    alone = batches_of(llava, samples, batch_size=2)
    with_workers = batches_of(llava, samples, batch_size=2, num_workers=2)
    assert len(alone) == len(with_workers)
    for left, right in zip(alone, with_workers, strict=True):
        assert torch.equal(left["input_ids"], right["input_ids"])
        assert ("vision" in left) == ("vision" in right)
        if "vision" in left:
            assert torch.equal(left["vision"]["pixel_values"], right["vision"]["pixel_values"])


def test_a_collator_reaches_workers_that_are_spawned(llava: str) -> None:
    data = Given(llava, [ask(1, 1)])
    data.setup("fit")
    copy = pickle.loads(pickle.dumps(data.collator()))
    items = data._datasets["train"][[0]]
    assert torch.equal(copy(items)["vision"]["pixel_values"], data.collator()(items)["vision"]["pixel_values"])


class Module(LightningModule):
    """Writes down, per process, which samples it got, and whether with images."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        assert all(isinstance(sample, Sample) for sample in batch["samples"])
        seen = [sample.row["question_id"] for sample in batch["samples"]]
        with (self.folder / f"rank{self.global_rank}").open("a") as file:
            file.write(json.dumps([seen, "vision" in batch]) + "\n")
        inputs = batch["vision"]["pixel_values"] if "vision" in batch else batch["input_ids"].float()
        return self.weight * inputs.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def steps(path: Path) -> list[tuple[list[int], bool]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:.*use of fork.*|.*multi-threaded.*", "ignore:.*no `validation_step`.*")
@pytest.mark.filterwarnings("ignore:2 of 33 samples were skipped")
def test_two_processes_share_the_batches_of_one_and_have_images_together(llava: str, tmp_path: Path) -> None:
    samples = [ask(number, number % 3 % 2) for number in range(31)]
    (tmp_path / "bad.png").write_bytes(png(picture(60, 40))[:-900])
    samples += [with_image(tmp_path / "bad.png"), with_image(tmp_path / "absent.png")]
    for name, batch_size, spread in [("one", 4, {}), ("two", 2, {"strategy": "ddp_fork", "devices": 2})]:
        (tmp_path / name).mkdir()
        data = Given(llava, samples, batch_size=batch_size, on_bad_row="skip")
        options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        options |= {"enable_checkpointing": False, "default_root_dir": tmp_path, "accelerator": "cpu"}
        Trainer(max_epochs=2, **options, **spread).fit(Module(tmp_path / name), datamodule=data)
    whole = steps(tmp_path / "one" / "rank0")
    left, right = (steps(tmp_path / "two" / f"rank{rank}") for rank in range(2))
    assert len(whole) == 18  # twice 3 batches of the 10 with images, 6 of the 21 without
    assert {number for seen, _ in whole for number in seen} == set(range(31))
    assert [(sorted(a + b), vision) for (a, vision), (b, _) in zip(left, right, strict=True)] == [
        (sorted(seen), vision) for seen, vision in whole
    ]
    assert [vision for _, vision in left] == [vision for _, vision in right]


class KilledError(Exception):
    """The machine went away."""


class SaveAndDie(Callback):
    """Saves a checkpoint after a step, and ends the run there."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KilledError


@pytest.mark.filterwarnings("ignore:.*no `validation_step`.*")
@pytest.mark.parametrize("step", [4, 9, 11])
def test_a_run_goes_on_with_the_batches_that_are_left(llava: str, tmp_path: Path, step: int) -> None:
    def fit(name: str, checkpoint: Path | None = None, callbacks: Sequence[Callback] = ()) -> list[Any]:
        (tmp_path / name).mkdir()
        data = Given(llava, [ask(number, number % 3 % 2) for number in range(31)], batch_size=4)
        options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        options |= {"default_root_dir": tmp_path, "accelerator": "cpu", "enable_checkpointing": False}
        trainer = Trainer(max_epochs=2, callbacks=list(callbacks), **options)
        trainer.fit(Module(tmp_path / name), datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return steps(tmp_path / name / "rank0")

    whole = fit("whole")  # of 9 batches an epoch
    checkpoint = tmp_path / "a.ckpt"
    with pytest.raises(KilledError):
        fit("first", callbacks=[SaveAndDie(checkpoint, step)])
    assert steps(tmp_path / "first" / "rank0") == whole[:step]
    assert fit("rest", checkpoint) == whole[step:]
    assert {vision for _, vision in whole[step:]} == {True, False}


class Unsteady:
    """An image that one of two processes cannot read in the threads that look at all of them at the start."""

    def open(self) -> Image.Image:
        in_thread = threading.current_thread() is not threading.main_thread()
        if in_thread and dist.is_initialized() and dist.get_rank() == 1:
            raise OSError("stale file handle")
        return picture(8, 8)


@pytest.mark.filterwarnings("ignore:.*use of fork.*|.*multi-threaded.*", "ignore:.*no `validation_step`.*")
@pytest.mark.filterwarnings("ignore:4 of 8 samples were skipped")
def test_processes_agree_on_the_samples(llava: str, tmp_path: Path) -> None:
    samples = [with_image(Unsteady(), row={"question_id": number}) for number in range(8)]
    data = Given(llava, samples, batch_size=1, on_bad_row="skip")
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options |= {"enable_checkpointing": False, "default_root_dir": tmp_path, "accelerator": "cpu"}
    Trainer(max_epochs=1, strategy="ddp_fork", devices=2, **options).fit(Module(tmp_path), datamodule=data)
    seen = [number for rank in range(2) for numbers, _ in steps(tmp_path / f"rank{rank}") for number in numbers]
    assert sorted(seen) == [0, 2, 4, 6]  # the second process looked at the others, and the first believes it


def test_a_setting_that_does_not_exist(llava: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_aspect_ratio must be 'pad' or 'plain', found 'anyres'"):
        Given(llava, [], image_aspect_ratio="anyres")
    with pytest.raises(ValueError, match="unknown conversation template 'vicuna'"):
        Given(llava, [], template="vicuna")
    with pytest.raises(ValueError, match="has no chat template of its own"):
        Given(llava, [], template="tokenizer").setup("fit")
    with pytest.raises(ValueError, match="is a language model alone"):
        Given(str(tiny_llama), []).setup("fit")
    folder = save_llava_processor(tmp_path, make_bpe(), image_token="<picture>")
    with pytest.raises(ValueError, match="the tokenizer has no token '<picture>'"):
        Given(folder, []).setup("fit")


def photo(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture(40, 20).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
@pytest.mark.parametrize("exif_rotation", [True, False])
@pytest.mark.parametrize("aspect", ["pad", "plain"])
def test_photos_are_turned_upright_unless_told_otherwise(
    llava_next: str, aspect: str, exif_rotation: bool, on_bad_row: str
) -> None:
    sample = with_image(photo(6))
    options = {"image_aspect_ratio": aspect, "exif_rotation": exif_rotation, "on_bad_row": on_bad_row}
    (batch,) = batches_of(llava_next, [sample], batch_size=1, **options)
    # EXIF 6: the stored image is to be turned by a quarter clockwise
    shown = picture(40, 20).rotate(-90, expand=True) if exif_rotation else picture(40, 20)
    shown = squared(shown) if aspect == "pad" else shown
    processor = AutoProcessor.from_pretrained(llava_next)
    expected = processor.image_processor(images=[shown], return_tensors="pt")
    assert torch.equal(batch["vision"]["pixel_values"], expected["pixel_values"])
    # a tall image takes another number of tokens than a wide one
    ids = batch["input_ids"][batch["attention_mask"].bool()].tolist()
    assert [ids] == processor(images=[shown], text=sample.prompt + sample.target)["input_ids"]


def test_a_video_s_header_is_read_once_and_equal_frames_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def read(path: Path, times: Sequence[float]) -> list[Image.Image]:
        reads.append(len(times))
        return [picture(40, 20) for _ in times]

    monkeypatch.setattr("dora_lightning.videos.frames.read_frames", read)

    def about(times: list[float]) -> Sample:
        return Sample("<image>" * 4, " A.</s>", images=tuple(video_frames("v.mp4", times)))

    questions = [about([number % 2, 2, 3, 4]) for number in range(20)]
    assert [sizes for _, sizes in usable_samples(questions, "raise")] == [((40, 20),) * 4] * 20
    assert reads == [1]
    reads.clear()
    usable_samples(questions, "skip")
    assert reads == [4, 4]  # frames at two choices of times
