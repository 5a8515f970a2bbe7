"""generate on a VL-BART: what the encoder makes of images, videos and features, and the texts it answers with."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import MakeTrainer, RunCLI
from tiny_llava import save_image
from tiny_vl_bart import save_bart
from torch import Tensor
from transformers import AutoTokenizer, BartForConditionalGeneration
from vl_bart_adapters import ALL, C, adapted, parts_of, save

from dora_lightning.offline import generate, load_finished, merge, models
from dora_lightning.vl_bart import VLBart, resolve_vl_bart

PROMPT = "vqa: what color is it?"
MakeModel = Callable[..., str]
Encoded = list[tuple[Tensor, Tensor]]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_model(bart: Path, tmp_path: Path, make_trainer: MakeTrainer) -> MakeModel:
    """Makes an adapter checkpoint ``adapter.ckpt`` and, beside it, the folder ``merged``."""

    def make(tower: str, kind: str = "grid", source: Path = bart, **options: Any) -> str:
        also = ALL if tower == "features" else [*ALL, "vision_tower"]
        module = adapted(parts_of(source, tower, kind), also_trained=also, **options)
        checkpoint = save(module, make_trainer(), tmp_path / "adapter.ckpt")
        merge(checkpoint, str(tmp_path / "merged"), overwrite=True)
        return checkpoint

    return make


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    """What the encoder gives the decoder, and its mask, of each batch."""
    seen: Encoded = []
    generate_targets = models.generate_targets

    def note(model: Any, tokenizer: Any, hidden: Tensor, mask: Tensor, **options: Any) -> list[str]:
        seen.append((hidden, mask))
        return generate_targets(model, tokenizer, hidden, mask, **options)

    monkeypatch.setattr(models, "generate_targets", note)
    return seen


def by_hand(folder: Path, prompt: str, **vision: Tensor) -> Tensor:
    network = VLBart.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return network.encode(ids, torch.ones_like(ids), **vision)[0]


def text_by_hand(folder: Path, prompt: str, new_tokens: int, **vision: Tensor) -> str:
    """The likeliest token each time; the last one allowed is the end, as BART's config says."""
    network, tokenizer = VLBart.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(prompt, return_tensors="pt")) | vision
    written = [tokenizer.eos_token_id]
    while len(written) < new_tokens and (len(written) == 1 or written[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            read = torch.tensor([written])
            written.append(int(network(**inputs, decoder_input_ids=read).logits[0, -1].argmax()))
    return tokenizer.decode(written, skip_special_tokens=True).strip()


def pixels(images: list[Any], side: int = 16) -> Tensor:
    """Scaled straight to the square, and normalised as CLIP's images are."""
    arrays = [np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    normalised = (np.stack(arrays) / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(normalised).float().permute(0, 3, 1, 2)


def assert_same(found: tuple[Tensor, Tensor], expected: Tensor) -> None:
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert bool(found[1].all())


# Images ----------------------------------------------------------------------------------------------------------


def test_an_image(
    make_model: MakeModel, tmp_path: Path, encoded: Encoded, capsys: pytest.CaptureFixture[str], run_cli: RunCLI
) -> None:
    checkpoint = make_model("vit")
    path = save_image(tmp_path / "image.png", 0, (40, 20))
    vision = {"pixel_values": pixels([Image.open(path)]), "image_counts": torch.tensor([1])}
    expected = by_hand(tmp_path / "merged", PROMPT, **vision)
    capsys.readouterr()
    written = []
    for model in (checkpoint, tmp_path / "merged"):
        run_cli("generate", model, "--prompt", PROMPT, "--image", path, "--max_new_tokens", 8)
        written.append(capsys.readouterr().out.strip())
        assert_same(encoded[-1], expected)
    assert written[0] == written[1] == text_by_hand(tmp_path / "merged", PROMPT, 8, **vision) != ""
    # another image is another matter, and so is text alone
    generate(checkpoint, prompt=PROMPT, image=str(save_image(tmp_path / "other.png", 1)))
    assert (encoded[-1][0] - expected).abs().max() > 0.01
    generate(checkpoint, prompt=PROMPT)
    assert_same(encoded[-1], by_hand(tmp_path / "merged", PROMPT))


def test_two_images(
    make_model: MakeModel, tmp_path: Path, encoded: Encoded, capsys: pytest.CaptureFixture[str], run_cli: RunCLI
) -> None:
    checkpoint = make_model("resnet")
    paths = [save_image(tmp_path / f"{number}.png", number, (40, 36)) for number in range(3)]
    run_cli("generate", checkpoint, "--prompt", "nlvr: true", "--image", f"[{paths[0]}, {paths[1]}]")
    images = pixels([Image.open(path) for path in paths[:2]], 32)
    expected = by_hand(tmp_path / "merged", "nlvr: true", pixel_values=images, image_counts=torch.tensor([2]))
    assert_same(encoded[-1], expected)
    # a ResNet's grid of one row makes its images the objects of one; a transformer's of four tells two images apart
    make_model("vit")
    with pytest.raises(ValueError, match=r"adapter\.ckpt tells 2 images apart \(image_orders\), found 3"):
        generate(checkpoint, prompt=PROMPT, image=[str(path) for path in paths])


def test_prompts_of_a_file_are_about_the_same(
    make_model: MakeModel, tmp_path: Path, encoded: Encoded, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_model("vit")
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\ncaption:\nvqa: is it red?\n")
    image = str(save_image(tmp_path / "image.png", 0))
    generate(checkpoint, prompts=str(tmp_path / "prompts.txt"), image=image, batch_size=2)
    assert [len(hidden) for hidden, _ in encoded] == [2, 1]
    vision = {"pixel_values": pixels([Image.open(image)]), "image_counts": torch.tensor([1])}
    for row, prompt in ((0, PROMPT), (1, "caption:")):
        hidden, mask = encoded[0]
        expected = by_hand(tmp_path / "merged", prompt, **vision)
        torch.testing.assert_close(hidden[row][mask[row].bool()], expected[0], rtol=1e-4, atol=1e-4)


# Videos ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Four seconds, each frame of another colour."""
    pytest.importorskip("av")
    from dora_lightning.videos import write_video

    frames = [np.full((32, 48, 3), (16 * n, 255 - 16 * n, 60), dtype=np.uint8) for n in range(16)]
    write_video(tmp_path / "clip.mp4", frames, rate=4)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, (0.0, 1.5, 3.0)),
        ({"every": 1.0}, (0.0, 1.0, 2.0, 3.0)),
        ({"frames": 2}, (1.0, 3.0)),
    ],
    ids=str,
)
def test_a_video(
    make_model: MakeModel, video: Path, tmp_path: Path, encoded: Encoded, options: Any, times: tuple[float, ...]
) -> None:
    from dora_lightning.videos import read_frames

    checkpoint = make_model("vit", kind="pooled")
    generate(checkpoint, prompt="a0 a1 tvqa:", video=str(video), **options)
    shown = {"pixel_values": pixels(read_frames(video, times)), "image_counts": torch.tensor([len(times)])}
    assert_same(encoded[-1], by_hand(tmp_path / "merged", "a0 a1 tvqa:", **shown))


def test_videos_that_cannot_be_shown(make_model: MakeModel, video: Path, tmp_path: Path) -> None:
    checkpoint = make_model("vit", kind="pooled")
    with pytest.raises(ValueError, match=r"tells 100 places of an image, or moments of a video, apart .* found 101"):
        generate(checkpoint, prompt=PROMPT, video=str(video), frames=101)
    with pytest.raises(ValueError, match=r"none\.mp4: no such video"):
        generate(checkpoint, prompt=PROMPT, video="none.mp4")
    short = tmp_path / "short.mp4"
    short.write_bytes(video.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"short\.mp4: not a video"):
        generate(checkpoint, prompt=PROMPT, video=str(short))
    make_model("vit")  # a grid of four rows each
    with pytest.raises(ValueError, match=r"tells 2 images apart \(image_orders\), found 3"):
        generate(checkpoint, prompt=PROMPT, video=str(video))


# Features --------------------------------------------------------------------------------------------------------


def written(path: Path, rows: int, seed: int = 0, width: int = C) -> tuple[str, Tensor]:
    """A file of features by its ending, and what is in it."""
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, features=features.numpy())
    elif path.suffix == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file[f"{path.stem}/features"] = features.numpy()
    else:
        save_file({"features": features}, path)
    return str(path), features


def orders(image: list[int], objects: list[int]) -> dict[str, Tensor]:
    return {
        "image_order": torch.tensor([image]),
        "object_order": torch.tensor([objects]),
        "visual_mask": torch.ones(1, len(image), dtype=torch.int64),
    }


@pytest.fixture
def reader(make_model: MakeModel) -> str:
    """A model that reads features alone."""
    return make_model("features")


def test_features_of_a_grid_are_pooled_as_published(reader: str, tmp_path: Path, encoded: Encoded) -> None:
    path, features = written(tmp_path / "dog.h5", 49)
    generate(reader, prompt=PROMPT, features=path)
    grid = features.view(7, 7, C)
    # 7 rows in 6 windows of two, the last five of them overlapping by one
    pooled = torch.stack([grid[y : y + 2, x : x + 2].amax((0, 1)) for y in range(6) for x in range(6)])
    expected = by_hand(tmp_path / "merged", PROMPT, features=pooled[None], **orders([0] * 36, list(range(36))))
    assert_same(encoded[-1], expected)
    generate(reader, prompt=PROMPT, features=path, rows=49)
    whole = by_hand(tmp_path / "merged", PROMPT, features=features[None], **orders([0] * 49, list(range(49))))
    assert_same(encoded[-1], whole)


def test_features_of_two_images(reader: str, tmp_path: Path, encoded: Encoded, run_cli: RunCLI) -> None:
    parts = [written(tmp_path / f"{name}.safetensors", 3 + seed, seed) for seed, name in enumerate("ab")]
    run_cli("generate", reader, "--prompt", PROMPT, "--features", f"[{parts[0][0]}, {parts[1][0]}]")
    features = torch.cat([part for _, part in parts])[None]
    expected = by_hand(
        tmp_path / "merged", PROMPT, features=features, **orders([0] * 3 + [1] * 4, [0, 1, 2, 0, 1, 2, 3])
    )
    assert_same(encoded[-1], expected)


@pytest.mark.parametrize("name", ["clip.npz", "folder/clip.safetensors"])
def test_features_of_a_video(reader: str, tmp_path: Path, encoded: Encoded, name: str) -> None:
    path, features = written(tmp_path / name, 5)
    if path.endswith(".safetensors"):
        (tmp_path / "folder" / "features.json").write_text('{"kind": "pooled", "every": 1.5}')
    generate(reader, prompt=PROMPT, features=path)
    filled = torch.cat([features, torch.zeros(59, C)])[None]
    expected = by_hand(tmp_path / "merged", PROMPT, features=filled, **orders([0] * 64, list(range(64))))
    assert_same(encoded[-1], expected)
    generate(reader, prompt=PROMPT, features=path, rows=5)
    assert_same(
        encoded[-1],
        by_hand(tmp_path / "merged", PROMPT, features=features[None], **orders([0] * 5, list(range(5)))),
    )


def test_features_that_cannot_be_read(reader: str, tmp_path: Path) -> None:
    path, _ = written(tmp_path / "wide.safetensors", 4, width=C + 1)
    with pytest.raises(ValueError, match=r"wide\.safetensors: features of 25 numbers, and this model reads 24"):
        generate(reader, prompt=PROMPT, features=path)
    with pytest.raises(FileNotFoundError, match=r"no file of features at none\.npz"):
        generate(reader, prompt=PROMPT, features="none.npz")
    with pytest.raises(
        ValueError, match=r"dog\.jpg: expected a file of features, ending in \.safetensors, \.h5, \.npz"
    ):
        generate(reader, prompt=PROMPT, features="dog.jpg")
    videos = [written(tmp_path / f"{name}.npz", 4)[0] for name in "ab"]
    with pytest.raises(ValueError, match=r"a\.npz holds features of a video, of which one is shown; found 2 files"):
        generate(reader, prompt=PROMPT, features=videos)
    odd, _ = written(tmp_path / "odd.safetensors", 50)
    with pytest.raises(ValueError, match=r"odd\.safetensors: expected .* square grid, found 50 rows; rows=50 leaves"):
        generate(reader, prompt=PROMPT, features=odd)


# What does not go together ---------------------------------------------------------------------------------------


def test_a_model_of_features_alone_is_shown_no_pixels(reader: str, tmp_path: Path) -> None:
    image = str(save_image(tmp_path / "image.png", 0))
    for options in ({"image": image}, {"video": "clip.mp4"}):
        with pytest.raises(ValueError, match=r"adapter\.ckpt has no vision tower and reads features .* of 24 numbers"):
            generate(reader, prompt=PROMPT, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 3}, "frames says which frames of a video are looked at, and no video is given"),
        ({"every": 3.0, "image": "a.jpg"}, "every says which frames of a video"),
        ({"video": "a.mp4", "every": 3.0, "frames": 2}, "give frames or every"),
        ({"video": "a.mp4", "frames": 0}, "frames must be at least 1, or null for the default, found 0"),
        (
            {"video": "a.mp4", "every": -1.0},
            r"every must be a number greater than 0, or null for the default, found -1\.0",
        ),
        ({"image": "a.jpg", "features": "a.npz"}, "give one of image, video and features, found image and features"),
        ({"image": "a.jpg", "rows": 4}, "rows is what features are brought to, and no features are given"),
        ({"features": "a.npz", "rows": 0}, "rows must be at least 1, or null for the default, found 0"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    # before anything is loaded
    with pytest.raises(ValueError, match=message):
        generate("no-such-model", prompt=PROMPT, **options)


def test_a_prompt_that_is_too_long(reader: str) -> None:
    with pytest.raises(ValueError, match=r"a prompt of 70\d tokens is too long: .*adapter\.ckpt reads at most 640"):
        generate(reader, prompt=" red" * 700)


def test_a_language_model_is_shown_no_video(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="reads text alone: an image needs a LLaVA-style model or a VL-BART"):
        generate(str(tiny_llama), prompt="hot", video="clip.mp4")


def test_mt_bench_is_for_language_models(bart: Path) -> None:
    with pytest.raises(ValueError, match="is a VL-BART: expected a causal language model"):
        load_finished(resolve_vl_bart(str(bart)))


# Templates and chat ----------------------------------------------------------------------------------------------


def test_the_prompt_is_bare_unless_a_template_is_given(reader: str, tmp_path: Path, encoded: Encoded) -> None:
    generate(reader, prompt="is it red?", template="vqa: {prompt}")
    assert_same(encoded[-1], by_hand(tmp_path / "merged", "vqa: is it red?"))
    generate(reader, prompt="vqa: is it red?", template="none")
    assert_same(encoded[-1], by_hand(tmp_path / "merged", "vqa: is it red?"))
    with pytest.raises(ValueError, match=r"has no chat template; choose --template none"):
        generate(reader, prompt="red", template="chat")


def test_in_a_chat_each_question_is_about_the_image(
    make_model: MakeModel, tmp_path: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_model("vit")
    monkeypatch.setattr(sys, "stdin", io.StringIO("is it red?\nis it blue?\n"))
    image = save_image(tmp_path / "image.png", 0)
    generate(checkpoint, image=str(image), max_new_tokens=4)
    vision = {"pixel_values": pixels([Image.open(image)]), "image_counts": torch.tensor([1])}
    for found, prompt in zip(encoded, ("is it red?", "is it blue?"), strict=True):
        assert_same(found, by_hand(tmp_path / "merged", prompt, **vision))


def test_a_base_in_half_precision_answers_as_its_merged_folder(
    make_model: MakeModel, bart: Path, tmp_path: Path, encoded: Encoded
) -> None:
    half: Any = BartForConditionalGeneration.from_pretrained(bart)
    half.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(bart).save_pretrained(tmp_path / "half")
    checkpoint = make_model("vit", source=tmp_path / "half")
    image = str(save_image(tmp_path / "image.png", 0))
    for model in (checkpoint, str(tmp_path / "merged")):
        generate(model, prompt=PROMPT, image=image)
    assert encoded[0][0].dtype == torch.bfloat16
    assert torch.equal(encoded[0][0], encoded[1][0])
