"""Features are those of this very tower and image, and are shared as the user's umask says."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from dora_lightning.backbones.feature_cache import FeatureCache


def make_tower(**options: Any) -> CLIPVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **(sizes | options))).requires_grad_(False)


def permuted(tower: CLIPVisionModel) -> CLIPVisionModel:
    (weight,) = (w for name, w in tower.named_parameters() if name.endswith("layers.0.mlp.fc1.weight"))
    weight.data = weight.data.flip(0)
    return tower


def test_features_of_a_tower_with_its_rows_in_another_order_or_another_activation_are_not_read(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 8, 8)
    FeatureCache(tmp_path, make_tower(), [-2])(images)
    again = FeatureCache(tmp_path, make_tower(), [-2])
    again(images)
    assert (again.read, again.computed) == (2, 0)
    for other in (permuted(make_tower()), make_tower(hidden_act="relu"), make_tower(layer_norm_eps=0.1)):
        expected = other(images, output_hidden_states=True).hidden_states[-2]
        cache = FeatureCache(tmp_path, other, [-2])
        assert torch.equal(cache(images).hidden_states[-2], expected)
        assert (cache.read, cache.computed) == (0, 2)


def test_images_of_one_color_and_other_sides_are_others(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, make_tower(), [-2])
    assert cache._path(torch.zeros(3, 4, 16)) != cache._path(torch.zeros(3, 16, 4))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_shared_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        FeatureCache(tmp_path, make_tower(), [-2])(torch.randn(1, 3, 8, 8))
    finally:
        os.umask(before)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
