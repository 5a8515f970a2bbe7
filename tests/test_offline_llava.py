"""generate and merge on a LLaVA: the checkpoint, the merged folder and transformers alone give the same text."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MakeTrainer, RunCLI, perturb_adapters
from tiny_llava import save_image, save_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlava
from dora_lightning.images import pad_to_square
from dora_lightning.offline import generate, merge, models


@pytest.fixture(params=[False, True], ids=["llava", "llava_next"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, make_trainer: MakeTrainer) -> str:
    llava = save_llava(tmp_path / "llava", next_generation=request.param)
    torch.manual_seed(0)
    module = DoRALlava(str(llava), AdapterConfig(rank=4, target_modules=["q_proj", "up_proj"]))
    module.configure_model()
    perturb_adapters(module)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    return str(tmp_path / "adapter.ckpt")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return save_image(tmp_path / "image.png", 0, (40, 20))


def by_transformers(folder: Path, pictures: list[Any], new_tokens: int) -> str:
    """What the merged folder says to ``is it hot?`` after so many pictures."""
    processor = AutoProcessor.from_pretrained(folder)
    network = AutoModelForImageTextToText.from_pretrained(folder)
    if not hasattr(processor.image_processor, "image_grid_pinpoints"):
        mean = tuple(int(255 * mean) for mean in processor.image_processor.image_mean)
        pictures = [pad_to_square(picture, mean) for picture in pictures]
    text = "<image>" * len(pictures) + "\nis it hot?"
    inputs = processor(text=text, images=pictures, return_tensors="pt")
    ids = network.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_an_image_is_asked_about(
    checkpoint: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(checkpoint, str(tmp_path / "merged"))
    capsys.readouterr()
    written = []
    for model in (checkpoint, str(tmp_path / "merged")):
        generate(model, prompt="is it hot?", image=str(image), template="none", max_new_tokens=10)
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert written[0].strip() == by_transformers(tmp_path / "merged", [Image.open(image)], 10)
    # without the image, and by the chat template
    generate(checkpoint, prompt="is it hot?", template="none", max_new_tokens=10)
    assert capsys.readouterr().out != written[0]
    generate(checkpoint, prompt="is it hot?", image=str(image), max_new_tokens=10)
    assert capsys.readouterr().out.strip()


def test_several_prompts_about_one_image(
    checkpoint: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("is it hot?\nPlease choose\n")
    generate(checkpoint, prompts=str(tmp_path / "prompts.txt"), image=str(image), template="none", max_new_tokens=6)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_images_of_different_shapes(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], run_cli: RunCLI
) -> None:
    merge(checkpoint, str(tmp_path / "merged"))
    sizes = ((40, 20), (16, 16), (20, 50))
    paths = [save_image(tmp_path / f"{number}.png", number, size) for number, size in enumerate(sizes)]
    capsys.readouterr()
    listed = ", ".join(map(str, paths))
    run_cli(
        "generate", checkpoint, "--prompt=is it hot?", f"--image=[{listed}]", "--template=none", "--max_new_tokens=10"
    )
    written = capsys.readouterr().out.strip()
    assert written == by_transformers(tmp_path / "merged", [Image.open(path) for path in paths], 10)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Four seconds of random pixels."""
    pytest.importorskip("av")
    from dora_lightning.videos import write_video

    frames = np.random.default_rng(0).integers(0, 256, (16, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames, rate=4)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, [0.25 + 0.5 * number for number in range(8)]),
        ({"frames": 2}, [1.0, 3.0]),
        ({"every": 1.5}, [0.0, 1.5, 3.0]),
    ],
    ids=str,
)
def test_a_video_is_asked_about(
    checkpoint: str,
    video: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    times: list[float],
) -> None:
    from dora_lightning.videos import read_frames

    merge(checkpoint, str(tmp_path / "merged"))
    capsys.readouterr()
    generate(checkpoint, prompt="is it hot?", video=str(video), template="none", max_new_tokens=10, **options)
    written = capsys.readouterr().out.strip()
    assert written == by_transformers(tmp_path / "merged", read_frames(video, times), 10)


def test_more_frames_than_the_model_reads_are_refused_undecoded(
    checkpoint: str, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dora_lightning.offline.shown.read_frames", None)
    with pytest.raises(
        ValueError, match=r"100000 frames of .*clip.mp4 take \d+ tokens each, and .*adapter.ckpt reads at most 512"
    ):
        generate(checkpoint, prompt="is it hot?", video=str(video), frames=100_000)
    with pytest.raises(ValueError, match="count must be from 1 to 100000 frames of a video, found 10000000"):
        generate(checkpoint, prompt="is it hot?", video=str(video), frames=10_000_000)


@pytest.mark.parametrize("template", ["none", "chat"])
def test_in_a_chat_the_image_stands_once_in_each_text(
    checkpoint: str, image: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    seen: list[str] = []

    def note(model: Any, tokenizer: Any, prompts: list[str], vision: Any, **options: Any) -> list[str]:
        seen.extend(prompts)
        return ["yes"]

    monkeypatch.setattr(models, "generate_texts", note)
    monkeypatch.setattr(sys, "stdin", io.StringIO("is it hot?\nis it cold?\n"))
    generate(checkpoint, image=str(image), template=template)
    counts = [text.count("<image>") for text in seen]
    assert len(counts) == 2
    assert counts[0] == counts[1] > 0


def test_features_are_not_for_llava(checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"looks at pixels: give it an image or a video; features are for VL-BART"):
        generate(checkpoint, prompt="is it hot?", features="dog.h5")


def test_a_language_model_is_shown_no_image(tiny_llama: Path, image: Path) -> None:
    with pytest.raises(ValueError, match="reads text alone: an image needs a LLaVA-style model"):
        generate(str(tiny_llama), prompt="is it hot?", image=str(image))


def test_an_image_that_is_not_there(checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"none\.png: no such image"):
        generate(checkpoint, prompt="is it hot?", image="none.png")
