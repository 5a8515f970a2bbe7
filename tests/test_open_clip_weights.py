"""Weights in files of every kind, against the open_clip models that they come from."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_open_clip import RESNET, VIT, build, images, last_map, refused, save, whole_clip
from torch import nn


def torchscript(model: nn.Module, folder: Path) -> bytes:
    """As OpenAI publishes its models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace_module(model, {"encode_image": images(64)}).save(str(folder / "traced"))
    return (folder / "traced").read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tower alone", "pt", "data parallel", "torchscript", "half"])
def test_files_of_weights(kind: str, tmp_path: Path) -> None:
    model = whole_clip(RESNET)
    expected, weights = last_map(model.visual, images(64)), model.state_dict()
    path = str(tmp_path / "weights.pt")
    if kind == "tower alone":
        path = save(model.visual.state_dict(), tmp_path / "visual.safetensors")
    elif kind == "pt":
        torch.save({"epoch": 3, "state_dict": weights}, path)
    elif kind == "data parallel":
        torch.save({f"module.{key}": tensor for key, tensor in weights.items()}, path)
    elif kind == "half":
        model.visual.half().float()
        expected = last_map(model.visual, images(64))
        halved = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
        path = save(halved, tmp_path / "half.safetensors")
    else:
        Path(path).write_bytes(torchscript(model, tmp_path))
    tower = build(config=RESNET, pretrained=path)
    assert tower.visual.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(tower(images(64)), expected.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_positions_are_interpolated_as_open_clip_does_it(tmp_path: Path) -> None:
    import open_clip

    path = save(whole_clip(VIT).state_dict(), tmp_path / "clip.safetensors")
    larger = whole_clip(VIT | {"image_size": 48})
    open_clip.load_checkpoint(larger, path)
    tower = build(config=VIT | {"image_size": 48}, pretrained=path, features="pooled")
    torch.testing.assert_close(tower(images(48)), larger.encode_image(images(48))[:, None])


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'opnai': expected a tag of RN101 \(openai, .*\) or a file"):
        build(name="RN101", pretrained="opnai")
    with pytest.raises(FileNotFoundError, match=r"'openai': expected a file"):
        build(config=RESNET, pretrained="openai")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    (tmp_path / "broken.pt").write_bytes(b"broken")
    for name in ("broken.safetensors", "broken.pt"):
        assert f"{name}: not a file of weights" in refused(config=RESNET, pretrained=str(tmp_path / name))
    other = save(whole_clip(VIT).state_dict(), tmp_path / "vit.safetensors")
    assert "vit.safetensors does not fit the vision tower of the config" in refused(config=RESNET, pretrained=other)


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    def fail(tag: dict[str, Any]) -> str:
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(FileNotFoundError, match=r"'openai' of RN101 could not be downloaded \(no network\)"):
        build(name="RN101", pretrained="openai")
