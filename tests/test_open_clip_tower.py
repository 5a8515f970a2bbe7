"""Features against open_clip's own whole models, pixels against torchvision's transforms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_open_clip import RESNET, VIT, build, images, last_map, refused, save, whole_clip
from torch import nn


@torch.no_grad()
def test_resnet_grid_is_the_last_map_row_by_row(tmp_path: Path) -> None:
    model = whole_clip(RESNET)
    tower = build(config=RESNET, pretrained=save(model.state_dict(), tmp_path / "clip.safetensors"))
    assert (tower.rows, tower.feature_dim, tower.image_size) == (4, 256, 64)

    features, expected = tower(images(64)), last_map(model.visual, images(64))
    assert features.shape == (2, 4, 256)
    for row in range(2):
        for column in range(2):
            torch.testing.assert_close(features[:, 2 * row + column], expected[:, :, row, column])


@torch.no_grad()
def test_published_tower_is_open_clips_rn101() -> None:
    import open_clip

    torch.manual_seed(5)
    model = open_clip.create_model("RN101", pretrained=None).eval()
    tower = build(name="RN101", rows=36, seed=5)
    assert (tower.rows, tower.feature_dim, tower.image_size) == (36, 2048, 224)
    assert (tower.mean, tower.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    tower.visual.load_state_dict(model.visual.state_dict(), strict=False)

    features, grid = tower(images(224, 1)), last_map(model.visual, images(224, 1))
    assert grid.shape == (1, 2048, 7, 7)
    expected = nn.AdaptiveMaxPool2d(6)(grid)
    torch.testing.assert_close(features[0, 6 * 4 + 5], expected[0, :, 4, 5])
    torch.testing.assert_close(features, expected.flatten(2).transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("config", [RESNET, VIT], ids=["resnet", "vit"])
def test_pooled_features_are_encode_image(config: dict[str, Any], tmp_path: Path) -> None:
    model = whole_clip(config)
    path = save(model.state_dict(), tmp_path / "clip.safetensors")
    tower = build(config=config, pretrained=path, features="pooled")
    assert (tower.rows, tower.feature_dim) == (1, 16)
    pixels = images(config["image_size"])
    torch.testing.assert_close(tower(pixels), model.encode_image(pixels)[:, None])
    if "patch_size" in config:  # CoCa's towers are made to give their tokens too
        tower = build(config=config | {"output_tokens": True}, pretrained=path, features="pooled")
        torch.testing.assert_close(tower(pixels), model.encode_image(pixels)[:, None])


@torch.no_grad()
def test_vit_grid_is_the_patches_after_the_last_norm(tmp_path: Path) -> None:
    model = whole_clip(VIT)
    tower = build(config=VIT, pretrained=save(model.state_dict(), tmp_path / "clip.safetensors"))
    assert (tower.rows, tower.feature_dim) == (16, 32)
    # open_clip gives the tokens behind its pooled embedding if asked
    model.visual.output_tokens = True
    torch.testing.assert_close(tower(images(32)), model.visual(images(32))[1])


@torch.no_grad()
def test_quick_gelu_is_that_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    model = whole_clip(VIT, quick_gelu=True)
    path = save(model.state_dict(), tmp_path / "clip.safetensors")
    expected = model.encode_image(images(32))[:, None]
    given = build(config=VIT | {"quick_gelu": True}, pretrained=path, features="pooled")
    torch.testing.assert_close(given(images(32)), expected)
    assert not torch.allclose(build(config=VIT, pretrained=path, features="pooled")(images(32)), expected)

    # the architecture ViT-B-32 has no quick_gelu, OpenAI's weights for it were trained with it
    fields = {key: value for key, value in VIT.items() if key != "embed_dim"}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {"embed_dim": 16, "vision_cfg": fields})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: path)
    named = build(name="ViT-B/32", pretrained="openai", features="pooled")
    torch.testing.assert_close(named(images(32)), expected)
    assert named.mean == open_clip.get_pretrained_cfg("ViT-B-32", "openai")["mean"]


@pytest.mark.parametrize("config", [RESNET, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize("features", ["grid", "pooled"])
def test_every_parameter_has_a_part_in_the_features(config: dict[str, Any], features: str) -> None:
    from dora_lightning.open_clip_tower import OpenClipVision, build_tower

    tower = build_tower(OpenClipVision(config=config, features=features))  # type: ignore[arg-type]
    tower(images(config["image_size"])).square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_a_new_tower_comes_from_its_seed_alone() -> None:
    torch.manual_seed(0)
    first, drawn = build(config=VIT, seed=7), torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == drawn, "building a tower must not use up the run's random numbers"
    again, other = build(config=VIT, seed=7), build(config=VIT, seed=8)
    assert torch.equal(first.visual.conv1.weight, again.visual.conv1.weight)
    assert not torch.equal(first.visual.conv1.weight, other.visual.conv1.weight)


def test_structure_alone_for_weights_from_elsewhere() -> None:
    from dora_lightning.open_clip_tower import OpenClipVision, build_tower

    vision = OpenClipVision(config=RESNET, pretrained="nowhere.safetensors")
    with torch.device("meta"):
        tower = build_tower(vision, weights=False)
    assert all(parameter.is_meta for parameter in tower.parameters())
    whole = build(config=RESNET)
    tower.load_state_dict(whole.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(tower.eval()(images(64)), whole(images(64)))


@torch.no_grad()
def test_pixels_may_come_in_another_dtype() -> None:
    tower = build(config=VIT).to(torch.bfloat16)
    assert tower(images(32)).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(50, 20), (20, 50), (224, 224)])
def test_pixels_are_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    from dora_lightning.open_clip_tower import CLIP_MEAN, CLIP_STD, image_pixels

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    published = Compose([Resize((64, 64), InterpolationMode.BICUBIC), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])
    pixels = image_pixels(image, 64, CLIP_MEAN, CLIP_STD)
    assert pixels.shape == (3, 64, 64)
    torch.testing.assert_close(pixels, published(image), rtol=0, atol=1e-6)


def test_grey_images_become_rgb() -> None:
    from dora_lightning.open_clip_tower import CLIP_MEAN, CLIP_STD, image_pixels

    assert image_pixels(Image.new("L", (9, 9), 30), 8, CLIP_MEAN, CLIP_STD).shape == (3, 8, 8)


def test_plain_containers() -> None:
    from dora_lightning.open_clip_tower import OpenClipVision

    vision = OpenClipVision(config=VIT, rows=4)
    assert OpenClipVision(**vision.to_dict()) == vision


def test_bad_options_are_named() -> None:
    assert "either a name or a config" in refused()
    assert "either a name or a config" in refused(name="RN101", config=RESNET)
    assert "close to it: RN101" in refused(name="RN10l")
    assert "timm's" in refused(name="ViT-B-16-SigLIP")
    assert "'widht' is no field" in refused(config={"widht": 8, "embed_dim": 16})
    assert "'timm_pool' is no field" in refused(config=VIT | {"timm_pool": "avg"})
    assert "embed_dim is missing" in refused(config={"width": 8})
    assert "'grid' or 'pooled', got 'grids'" in refused(config=VIT, features="grids")
    assert "square number such as 36, got 35" in refused(config=VIT, rows=35)
    assert "rows are for features: grid" in refused(config=VIT, features="pooled", rows=4)
    assert "the grid of this tower has 16" in refused(config=VIT, rows=25)
    assert "multiple of 32, got 80" in refused(config=RESNET | {"image_size": 80})
    assert "expected a square, got [32, 64]" in refused(config=VIT | {"image_size": [32, 64]})
    assert "can build no tower" in refused(config=VIT | {"layers": "two"})
    assert "patches are missing in training" in refused(config=VIT | {"patch_dropout": 0.5})
    assert "attentional_pool has no grid" in refused(config=VIT | {"attentional_pool": True})
    assert "pool_type: none has no pooled" in refused(config=VIT | {"pool_type": "none"}, features="pooled")
