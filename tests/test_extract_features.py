"""Records against a tower run by hand on each file; interrupted runs against uninterrupted ones, byte by byte."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import RunCLI
from torch import Tensor

RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 64}
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
REPOSITORY = Path(__file__).parents[1]


def extract(source: Path, output: Path, **options: Any) -> None:
    from dora_lightning.extract_features import extract_features

    defaults: dict[str, Any] = {"pretrained": None, "random_seed": 1, "workers": 0, "batch_size": 4, "device": "cpu"}
    extract_features(str(source), str(output), **(defaults | options))


def model_file(folder: Path, vision: dict[str, Any]) -> str:
    """As the files in open_clip's model_configs."""
    path = folder / f"tower{vision['width']}.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"layers": 1}}))
    return str(path)


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 30)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(count)
    paths = [folder / f"n{number:03d}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return paths


def write_clip(path: Path, seconds: float) -> Path:
    """A clip of 4 frames a second, each of a grey of its own, with the index at its head."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(int(seconds * 4))
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()  # writes a head even where no frame follows
        for _ in range(int(seconds * 4)):
            pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    return path


def records(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def read(folder: Path, name: str) -> Tensor:
    from dora_lightning.feature_files import FeatureFolder

    return FeatureFolder(folder).read(name)


def by_hand(vision: dict[str, Any], kind: Any, images: list[Image.Image], seed: int = 1) -> Tensor:
    """``[rows, C]`` of images that go through the tower one at a time."""
    from dora_lightning.open_clip_tower import OpenClipVision, build_tower, image_pixels

    tower = build_tower(OpenClipVision(config=vision | {"embed_dim": 16}, features=kind, seed=seed)).eval()
    with torch.no_grad():
        return torch.cat([tower(image_pixels(i, tower.image_size, tower.mean, tower.std)[None])[0] for i in images])


def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_images(tmp_path / "images" / "train", 5) + write_images(tmp_path / "images" / "val.x", 1)
    paths[-1] = paths[-1].rename(paths[-1].with_name("other.v2.PNG"))
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    extract(tmp_path / "images", tmp_path / "out", model=model_file(tmp_path, RESNET))
    assert list(records(tmp_path / "out")) == [
        *(f"train/n00{number}.safetensors" for number in range(5)),
        "val.x/other.v2.safetensors",
    ]
    for path in paths:
        with Image.open(path) as image:
            expected = by_hand(RESNET, "grid", [image])
        features = read(tmp_path / "out", path.stem)
        assert features.shape == (4, 256)
        torch.testing.assert_close(features, expected.half().float(), rtol=2e-3, atol=1e-5)
    assert "Features of 6 files" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "out" / "features.json").read_text())
    assert recorded["model"] == RESNET | {"embed_dim": 16, "quick_gelu": False}
    assert {key: recorded[key] for key in ("kind", "rows", "feature_dim", "image_size", "dtype")} == {
        "kind": "grid",
        "rows": 4,
        "feature_dim": 256,
        "image_size": 64,
        "dtype": "float16",
    }


def test_videos_of_any_length_share_batches(tmp_path: Path) -> None:
    from dora_lightning.videos import read_frames

    lengths = {"short": 1.0, "middle": 6.0, "long": 14.0}
    for name, seconds in lengths.items():
        write_clip(tmp_path / "clips" / f"{name}.mp4", seconds)
    options = {"model": model_file(tmp_path, VIT), "kind": "pooled", "dtype": "float32"}
    extract(tmp_path / "clips", tmp_path / "out", every=1.5, **options)
    times = {"short": [0], "middle": [0, 1.5, 3, 4.5], "long": [0, 1.5, 3, 4.5, 6, 7.5, 9, 10.5, 12, 13.5]}
    for name, expected in times.items():
        frames = read_frames(tmp_path / "clips" / f"{name}.mp4", expected)
        features = read(tmp_path / "out", name)
        assert features.shape == (len(expected), 16)
        torch.testing.assert_close(features, by_hand(VIT, "pooled", frames), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"every: 1.5 in the folder, 3.0 expected"):
        extract(tmp_path / "clips", tmp_path / "out", every=3.0, **options)


def test_videos_are_not_kept_as_grids(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips" / "a.mp4", 1)
    with pytest.raises(ValueError, match="kind: videos have one row a frame, choose pooled"):
        extract(tmp_path / "clips", tmp_path / "out", model=model_file(tmp_path, VIT))


def test_workers_change_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 11)
    model = model_file(tmp_path, RESNET)
    extract(tmp_path / "images", tmp_path / "one", model=model)
    extract(tmp_path / "images", tmp_path / "two", model=model, workers=2)
    assert records(tmp_path / "one") == records(tmp_path / "two")


def test_what_is_there_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", 11)
    model = model_file(tmp_path, RESNET)
    extract(tmp_path / "images", tmp_path / "out", model=model, dtype="float32")
    whole, there = records(tmp_path / "out"), sorted((tmp_path / "out").glob("*.safetensors"))
    for path in there[3:8:2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in there if path.exists()}
    capsys.readouterr()
    extract(tmp_path / "images", tmp_path / "out", model=model, dtype="float32")
    assert "Features of 3 files" in capsys.readouterr().out
    assert records(tmp_path / "out") == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dora_lightning.open_clip_tower import OpenClipTower

    write_images(tmp_path / "images", 2)
    model = model_file(tmp_path, RESNET)
    extract(tmp_path / "images", tmp_path / "out", model=model)
    monkeypatch.setattr(OpenClipTower, "forward", None)
    extract(tmp_path / "images", tmp_path / "out", model=model)
    assert "Features of 0 files" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_after_being_killed(workers: int, tmp_path: Path) -> None:
    write_images(tmp_path / "source" / "images", 150)
    for number in range(6):
        write_clip(tmp_path / "source" / "clips" / f"c{number}.mp4", 3 + 2 * number)
    model = model_file(tmp_path, VIT)
    options = {"batch_size": 4, "random_seed": 1, "workers": workers, "kind": "pooled", "device": "cpu"}
    given = [part for name, value in (options | {"model": model}).items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "dora_lightning", "extract-features"]
    command += [str(tmp_path / "source"), str(tmp_path / "out"), "--pretrained", "null", *given]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while len(list((tmp_path / "out").rglob("*.safetensors"))) < 20 and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)

    killed = records(tmp_path / "out")
    assert 20 <= len(killed) < 156
    for name in killed:
        assert read(tmp_path / "out", name.removesuffix(".safetensors")).shape[1] == 16
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in killed}

    extract(tmp_path / "source", tmp_path / "out", model=model, **(options | {"workers": 0}))
    extract(tmp_path / "source", tmp_path / "whole", model=model, **(options | {"workers": 0}))
    assert len(records(tmp_path / "whole")) == 156
    assert records(tmp_path / "out") == records(tmp_path / "whole")
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in killed}
    assert list((tmp_path / "out").rglob("*.partial")) == []


def break_some(source: Path) -> dict[str, str]:
    """Files that are broken in all sorts of ways, and what is said of them."""
    images = write_images(source, 9)
    images[2].write_bytes(b"no image at all")
    images[4].write_bytes(images[4].read_bytes()[:1500])  # the head is whole
    clips = [write_clip(source / f"c{number}.mp4", 8) for number in range(5)]
    clips[1].write_bytes(clips[1].read_bytes()[: clips[1].stat().st_size * 6 // 10])  # the head is whole
    clips[2].write_bytes(clips[2].read_bytes()[:300])
    clips[3].write_bytes(b"")
    clips[4].unlink()
    write_clip(clips[4], 0)
    return {
        "n002.png": "not an image",
        "n004.png": "cannot be decoded",
        "c1.mp4": "c1.mp4: ",
        "c2.mp4": "c2.mp4: ",
        "c3.mp4": "the file is empty",
        "c4.mp4": "of zero length",
    }


def test_bad_files_are_left_out_and_listed(tmp_path: Path) -> None:
    reasons = break_some(tmp_path / "source")
    options: dict[str, Any] = {"model": model_file(tmp_path, VIT), "kind": "pooled", "dtype": "float32"}
    with pytest.raises(ValueError, match="6 of 14 files were left out:") as error:
        extract(tmp_path / "source", tmp_path / "out", on_bad_file="skip", **options)
    listed = str(error.value).splitlines()[1:]
    assert len(listed) == 6
    assert listed == sorted(listed)
    for name, reason in reasons.items():
        assert any(f"{name}: " in line and reason in line for line in listed), (name, listed)
    good = {f"n00{number}.safetensors" for number in (0, 1, 3, 5, 6, 7, 8)} | {"c0.safetensors"}
    assert set(records(tmp_path / "out")) == good
    # what lies in a batch beside a bad file is as it should be
    with Image.open(tmp_path / "source" / "n005.png") as image:
        expected = by_hand(VIT, "pooled", [image])
    torch.testing.assert_close(read(tmp_path / "out", "n005"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["n002.png", "n004.png", "c1.mp4", "c2.mp4", "c3.mp4", "c4.mp4"])
def test_a_bad_file_stops_the_run(name: str, tmp_path: Path) -> None:
    for other in break_some(tmp_path / "source").keys() - {name}:
        (tmp_path / "source" / other).unlink()
    with pytest.raises(ValueError, match=rf"{name}: "):
        extract(tmp_path / "source", tmp_path / "out", model=model_file(tmp_path, VIT), kind="pooled")
    assert Path(name).with_suffix(".safetensors").name not in records(tmp_path / "out")


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_images(tmp_path / "images" / folder, 1)
    with pytest.raises(ValueError, match=r"two files have the name 'n000'.*a/n000.png, .*b/n000.png"):
        extract(tmp_path / "images", tmp_path / "out", model=model_file(tmp_path, VIT))
    assert not (tmp_path / "out").exists()


def test_features_of_another_model_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    model = model_file(tmp_path, VIT)
    extract(tmp_path / "images", tmp_path / "out", model=model)
    for changed, message in {
        "random_seed": "weights: ",
        "kind": "kind: 'grid' in the folder, 'pooled' expected",
        "dtype": "dtype: 'float16' in the folder, 'float32' expected",
        "model": r"model: \{'layers': 2",
    }.items():
        value = {"random_seed": 2, "kind": "pooled", "dtype": "float32", "model": model_file(tmp_path, RESNET)}[changed]
        with pytest.raises(ValueError, match=message):
            extract(tmp_path / "images", tmp_path / "out", **({"model": model} | {changed: value}))


def test_settings_know_what_the_weights_do_not_tell(tmp_path: Path) -> None:
    """Batch norms' statistics and the activation are no parameters."""
    from dora_lightning.open_clip_tower import OpenClipVision, build_tower

    write_images(tmp_path / "images", 1)
    tower = build_tower(OpenClipVision(config=RESNET | {"embed_dim": 16}))
    for number in range(2):
        tower.visual.bn1.running_mean.fill_(float(number))
        save_file(tower.state_dict(), tmp_path / f"{number}.safetensors")
    options: dict[str, Any] = {"model": model_file(tmp_path, RESNET), "random_seed": None}
    extract(tmp_path / "images", tmp_path / "out", pretrained=str(tmp_path / "0.safetensors"), **options)
    with pytest.raises(ValueError, match="weights: "):
        extract(tmp_path / "images", tmp_path / "out", pretrained=str(tmp_path / "1.safetensors"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0.0}, "every must be a number greater than 0, found 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"random_seed": None}, "either pretrained weights or, for an untrained tower"),
        ({"pretrained": "openai"}, "either pretrained weights or, for an untrained tower"),
        ({"model": "RN1O1"}, "open_clip has no architecture 'RN1O1'"),
        ({"device": "cuda:77"}, "device: 'cuda:77' is not there"),
        ({"device": "gpu"}, "device: 'gpu' is not there"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    with pytest.raises(ValueError, match=message):
        extract(tmp_path / "images", tmp_path / "out", **({"model": model_file(tmp_path, VIT)} | options))
    assert not (tmp_path / "out").exists()


def test_bad_sources_and_model_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder of images or videos at .*nowhere"):
        extract(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images or videos"):
        extract(tmp_path / "empty", tmp_path / "out")
    write_images(tmp_path / "images", 1)
    with pytest.raises(FileNotFoundError, match=r"no open_clip model config at .*none.json"):
        extract(tmp_path / "images", tmp_path / "out", model=str(tmp_path / "none.json"))
    for content in ("{", "[]", '{"embed_dim": 16}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad.json is no open_clip model config"):
            extract(tmp_path / "images", tmp_path / "out", model=str(tmp_path / "bad.json"))


def test_the_verb(run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", 3)
    given = ["--model", model_file(tmp_path, VIT), "--pretrained", "null", "--random_seed", 1, "--workers", 0]
    run_cli("extract-features", "images", "out", *given, "--device", "cpu")
    assert "Features of 3 files: out" in capsys.readouterr().out
    assert len(records(tmp_path / "out")) == 3
    (tmp_path / "images" / "bad.png").write_text("no image")
    with pytest.raises(SystemExit) as stopped:
        run_cli("extract-features", "images", "out", *given, "--device", "cpu", "--on_bad_file", "skip")
    assert "dora-lightning: error: 1 of 4 files were left out" in str(stopped.value)


def test_photos_are_turned_upright_unless_told_otherwise(tmp_path: Path) -> None:
    (path,) = write_images(tmp_path / "photos", 1)
    stored = Image.open(path)
    stored.load()
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(path, exif=exif)
    model = model_file(tmp_path, VIT)
    for turned, shown in ((True, stored.rotate(-90, expand=True)), (False, stored)):
        folder = tmp_path / f"features-{turned}"
        extract(tmp_path / "photos", folder, model=model, kind="pooled", dtype="float32", exif_rotation=turned)
        torch.testing.assert_close(read(folder, path.stem), by_hand(VIT, "pooled", [shown.convert("RGB")]))
        # a folder holds features of one kind; those from before there was a choice are of photos that were not turned
        assert ("exif_rotation" in json.loads((folder / "features.json").read_text())) == turned
        with pytest.raises(ValueError, match="holds features of other settings: exif_rotation"):
            extract(tmp_path / "photos", folder, model=model, kind="pooled", dtype="float32", exif_rotation=not turned)
