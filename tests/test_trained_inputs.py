"""How a run made its inputs is in its checkpoint and merged folder, and the finished model is asked alike."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import MakeBackbone, MakeData, MakeTrainer
from tiny_llava import save_image, save_llava

from datamodules import LlavaInstructions
from datamodules.vl_bart.visuals import VisualFiles, Visuals
from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlava
from dora_lightning.images import open_image, pad_to_square
from dora_lightning.offline import generate, merge, models
from dora_lightning.offline.shown import Shown
from dora_lightning.training.adapter_checkpoint import read_adapter_checkpoint
from dora_lightning.training.trained_inputs import read_inputs

# of Lightning: a run without validation data, and torch's own tree of a batch
pytestmark = pytest.mark.filterwarnings(
    "ignore:Total length of `list` across ranks is zero:UserWarning", "ignore:.*LeafSpec.*:FutureWarning"
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA = f"{SYSTEM} USER: {{prompt}} ASSISTANT:"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A wide photo whose EXIF data say that it is to be turned by a quarter."""
    path = save_image(tmp_path / "photo.png", 0, (40, 20))
    image = Image.open(path)
    image.load()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    return path


@pytest.fixture
def train(tmp_path: Path, photo: Path, make_trainer: MakeTrainer) -> Callable[..., str]:
    """Trains a tiny LLaVA for one step and returns its checkpoint."""
    llava = save_llava(tmp_path / "llava")
    turns = [{"from": "human", "value": "<image>\nis it hot?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": number, "image": photo.name, "conversations": turns} for number in range(2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def run(**options: Any) -> str:
        data = LlavaInstructions(str(llava), str(tmp_path / "rows.json"), batch_size=2, num_workers=0, **options)
        module = DoRALlava(str(llava), AdapterConfig(rank=4, target_modules=["q_proj"]))
        trainer = make_trainer(max_steps=1)
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "adapter.ckpt")
        return str(tmp_path / "adapter.ckpt")

    return run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What finished models are asked: prompts and what they look at."""
    calls: list[Any] = []

    def note(model: Any, tokenizer: Any, prompts: list[str], vision: Any, **options: Any) -> list[str]:
        calls.append((prompts, vision))
        return ["yes"] * len(prompts)

    monkeypatch.setattr(models, "generate_texts", note)
    return calls


def pixels(model: str, image: Image.Image) -> torch.Tensor:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model).image_processor(images=[image], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("aspect", ["pad", "plain"])
@pytest.mark.parametrize("turned", [True, False])
def test_images_and_prompts_are_those_of_training(
    train: Callable[..., str],
    seen: list[Any],
    photo: Path,
    tmp_path: Path,
    aspect: str,
    turned: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = train(image_aspect_ratio=aspect, exif_rotation=turned)
    recorded = {"image_aspect_ratio": aspect, "exif_rotation": turned, "prompt": VICUNA}
    assert read_adapter_checkpoint(checkpoint).inputs == recorded
    merge(checkpoint, str(tmp_path / "merged"))
    assert read_inputs(tmp_path / "merged") == recorded
    image = open_image(photo, turned)
    image = pad_to_square(image, (122, 116, 104)) if aspect == "pad" else image
    expected = pixels(str(tmp_path / "llava"), image)
    capsys.readouterr()
    for model in (checkpoint, str(tmp_path / "merged")):
        generate(model, prompt="is it hot?", image=str(photo))
        (prompt,), vision = seen.pop()
        assert prompt == VICUNA.replace("{prompt}", "<image>" * 4 + "\nis it hot?")
        torch.testing.assert_close(vision["pixel_values"].cpu(), expected)
        assert "trained" not in capsys.readouterr().err  # as it was trained: nothing to say


def test_differences_are_said_by_name(
    train: Callable[..., str], seen: list[Any], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = train(image_aspect_ratio="pad")
    capsys.readouterr()
    options = {"image_aspect_ratio": "plain", "exif_rotation": False, "template": "none"}
    generate(checkpoint, prompt="is it hot?", image=str(photo), **options)
    said = capsys.readouterr().err
    for line in (
        "image_aspect_ratio is 'plain', and the model was trained with 'pad'",
        "exif_rotation is False, and the model was trained with True",
        "prompt is '{prompt}', and the model was trained with \"A chat between",
    ):
        assert said.count(line) == 1
    (prompt,), vision = seen.pop()
    assert prompt == "<image>" * 4 + "\nis it hot?"
    torch.testing.assert_close(
        vision["pixel_values"].cpu(), pixels(str(tmp_path / "llava"), open_image(photo, exif_rotation=False))
    )


def test_where_nothing_is_recorded_it_is_as_published_and_said(
    train: Callable[..., str], seen: list[Any], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = train(image_aspect_ratio="plain")
    content = torch.load(checkpoint, weights_only=True)
    del content["dora_lightning"]["inputs"]  # written before it was recorded
    torch.save(content, checkpoint)
    capsys.readouterr()
    generate(checkpoint, prompt="is it hot?", image=str(photo), template="none")
    note = (
        "nothing tells how what it looked at was prepared in its training; used is image_aspect_ratio 'pad', exif_rot"
    )
    assert capsys.readouterr().err.count(note) == 1
    squared = pad_to_square(open_image(photo, exif_rotation=False), (122, 116, 104))
    torch.testing.assert_close(seen.pop()[1]["pixel_values"].cpu(), pixels(str(tmp_path / "llava"), squared))


def test_options_that_do_not_go_with_what_is_shown(tiny_llama: Path) -> None:
    for options, message in {
        ("image_aspect_ratio", "pad"): "image_aspect_ratio is how images are squared, and no image",
        ("exif_rotation", True): "exif_rotation is how images are turned, and no image",
    }.items():
        with pytest.raises(ValueError, match=message):
            generate(str(tiny_llama), prompt="?", **dict([options]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 'pad' or 'plain', got 'wide'"):
        generate(str(tiny_llama), prompt="?", image="a.png", image_aspect_ratio="wide")  # type: ignore[arg-type]


def test_a_language_model_is_asked_by_the_prompt_it_was_trained_with(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, seen: list[Any], tmp_path: Path
) -> None:
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(make_backbone(), make_data(template="plain"))
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    generate(str(tmp_path / "adapter.ckpt"), prompt="Is water wet?")
    assert seen.pop()[0] == ["Question: Is water wet?\nAnswer:"]
    # and another template in a test is said
    other = make_trainer(limit_test_batches=0)
    with pytest.warns(UserWarning, match=r"reads other inputs now: prompt is 'Below is .* trained with 'Question: "):
        other.validate(
            make_backbone(), make_data(template="alpaca"), ckpt_path=tmp_path / "adapter.ckpt", verbose=False
        )


def test_videos_and_features_are_shown_as_trained(tmp_path: Path) -> None:
    bart = {"exif_rotation": False, "frames": None, "every": 1.5}
    video = Shown(video="a.mp4")
    shown, notes = video.as_trained({"frames": 4, "every": None}, bart)
    assert (shown.frames, shown.every, notes) == (4, None, [])
    shown, notes = Shown(video="a.mp4", every=2.0).as_trained({"frames": 4, "every": None}, bart)
    assert (shown.frames, shown.every) == (None, 2.0)
    assert notes == ["every is 2.0, and the model was trained with None"]
    shown, notes = video.as_trained({"prompt": "{prompt}"}, bart)
    assert (shown.frames, shown.every) == (None, 1.5)
    assert notes == ["nothing tells how what it looked at was prepared in its training; used is every 1.5"]
    # rows of features: null in training is all of them
    save_file({"features": torch.randn(49, 8)}, tmp_path / "a.safetensors")
    features = Shown(features=[str(tmp_path / "a.safetensors")])
    for trained, rows in (({"grid_rows": None}, 49), ({"grid_rows": 9}, 9), ({}, 36)):
        shown, notes = features.as_trained(trained, bart)
        assert shown.feature_inputs(8)["features"].shape == (1, rows, 8)
        assert bool(notes) == (not trained)
    _, notes = replace(features, rows=4).as_trained({"grid_rows": 9}, bart)
    assert notes == ["grid_rows is 4, and the model was trained with 9"]


def test_tasks_that_differ_say_what_they_have_in_common(tmp_path: Path) -> None:
    files = [VisualFiles(images=str(tmp_path)), VisualFiles(images=str(tmp_path), exif_rotation=False)]
    photos, stored = (Visuals(one, of_videos=False).trained_inputs() for one in files)
    assert (photos, stored) == ({"exif_rotation": True}, {"exif_rotation": False})
    videos = Visuals(VisualFiles(videos=str(tmp_path)), of_videos=True)
    assert videos.trained_inputs() == {"frames": None, "every": 1.5}
    assert Visuals(VisualFiles(features=str(tmp_path), video_rows=None), True).trained_inputs() == {"video_rows": None}
