"""CLIP's vision towers as open_clip builds them: images in, rows of features out.

In VL-Adapter's setting images are the last convolutional grid of RN101, and frames of a video the projected embedding
of ViT-B/32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from math import isqrt
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dora_lightning.feature_rows import pool_grid
from dora_lightning.messages import check_whole
from dora_lightning.open_clip_weights import load_weights, plain_name, weights_file

GRID, POOLED = "grid", "pooled"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# an open_clip ResNet makes one row of its grid of this many rows of pixels
_RESNET_STRIDE = 32


@dataclass
class OpenClipVision:
    """A vision tower of open_clip, by name or by its fields.

    Args:
        name: architecture, one of ``open_clip.list_models()``, e.g. ``RN101`` or ``ViT-B-32``.
        pretrained: tag of open_clip's weights, such as ``openai``, which are downloaded; or a file of weights
            (``.safetensors``, ``.bin``, ``.pt``, the whole CLIP or its vision tower); null for a new tower.
        config: fields of open_clip's ``CLIPVisionCfg``, with ``embed_dim`` and, if need be, ``quick_gelu`` beside
            them, in place of a name.
        features: ``grid`` for the last feature map (the last convolution's of a ResNet; the patch tokens of a
            transformer after its last norm); ``pooled`` for the projected embedding, one row.
        rows: rows that the grid is max-pooled to, a square number such as 36 of 49; null for all of them.
        seed: seed of a new tower.

    Raises:
        ValueError: neither or both of name and config are given, or a value or a field is unknown.
    """

    name: str | None = None
    pretrained: str | None = None
    config: dict[str, Any] | None = None
    features: Literal["grid", "pooled"] = "grid"
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_whole(1, none="all of them", rows=self.rows)
        check_whole(0, seed=self.seed)
        if (self.name is None) == (self.config is None):
            raise ValueError("a vision tower has either a name or a config: give one of them")
        if self.features not in (GRID, POOLED):
            raise ValueError(f"features: expected {GRID!r} or {POOLED!r}, got {self.features!r}")
        if self.rows is not None:
            if self.features == POOLED:
                raise ValueError(f"rows: a {POOLED} image is one row; rows are for features: {GRID}")
            if isqrt(self.rows) ** 2 != self.rows:
                raise ValueError(f"rows: expected a square number such as 36, got {self.rows}")
        if self.config is not None:
            _check_fields(self.config)
        elif self.name is not None:
            _check_name(self.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, for checkpoints."""
        return asdict(self)


class OpenClipTower(nn.Module):
    """The vision tower of a CLIP and nothing else of it; parts of it that the features do not come from are dropped.

    Freezing is the caller's business: a frozen ResNet has to be in eval mode, or its batch norms go on learning.

    Args:
        visual: open_clip's ``ModifiedResNet`` or ``VisionTransformer``.
        features: ``grid`` or ``pooled``, see :class:`OpenClipVision`.
        rows: rows that the grid is max-pooled to; None for all of them.
        mean: what is taken from each colour channel of a pixel in [0, 1].
        std: what it is divided by then.

    Raises:
        ValueError: the tower has no such features.
    """

    def __init__(
        self,
        visual: Any,
        features: str = GRID,
        rows: int | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.visual = visual
        self.features = features
        self.image_size = _square(visual.image_size)
        """Pixels of a side."""
        self.mean, self.std = tuple(mean), tuple(std)
        self.dropped: tuple[str, ...] = ()
        """Parts of open_clip's tower that are left out."""
        if features == POOLED:
            if getattr(visual, "pool_type", "") == "none":
                raise ValueError(f"a tower with pool_type: none has no {POOLED} features")
            self.rows = 1
            """Rows of features an image has."""
            self.feature_dim = int(visual.output_dim)
            """Numbers in a row."""
            return
        self.feature_dim, found = self._prepare_grid()
        self.rows = found if rows is None else rows
        if self.rows > found:
            raise ValueError(f"rows: the grid of this tower has {found}, it cannot be pooled to {rows}")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features ``[N, rows, feature_dim]`` of images ``pixel_values [N, 3, image_size, image_size]``.

        The grid is read row by row from the upper left.
        """
        pixel_values = pixel_values.to(self.visual.conv1.weight.dtype)
        if self.features == POOLED:
            return self.visual(pixel_values)[:, None]
        found = self.visual.forward_intermediates(
            pixel_values, indices=1, normalize_intermediates=True, intermediates_only=True
        )
        return pool_grid(found["image_intermediates"][0].flatten(2).transpose(1, 2), self.rows)

    def _prepare_grid(self) -> tuple[int, int]:
        """Numbers in a row and rows of the whole grid; what is needed for the embedding alone is dropped."""
        if hasattr(self.visual, "attnpool"):
            if self.image_size % _RESNET_STRIDE:
                raise ValueError(f"image_size: expected a multiple of {_RESNET_STRIDE}, got {self.image_size}")
            width = self.visual.attnpool.k_proj.in_features
            self.visual.attnpool = None
            self.dropped = ("attnpool",)
            return width, (self.image_size // _RESNET_STRIDE) ** 2
        if self.visual.attn_pool is not None:
            raise ValueError(f"a tower with attentional_pool has no {GRID} features; choose features: {POOLED}")
        if not isinstance(self.visual.patch_dropout, nn.Identity):
            raise ValueError(f"a tower with patch_dropout has no {GRID} features: patches are missing in training")
        self.visual.proj = None
        self.dropped = ("proj",)
        return self.visual.conv1.out_channels, self.visual.grid_size[0] * self.visual.grid_size[1]


def build_tower(vision: OpenClipVision, weights: bool = True) -> OpenClipTower:
    """The tower, in training mode as every new module.

    Args:
        vision: what to build.
        weights: load or draw its weights, on the CPU; without, it is a structure for weights that come from elsewhere,
            and may be built on the meta device.

    Raises:
        FileNotFoundError: the weights cannot be had.
        ValueError: the weights do not fit, or no tower can be built from the fields.
    """
    import open_clip

    tag: dict[str, Any] = {}
    if vision.name is not None:
        name = plain_name(vision.name)
        tag = open_clip.get_pretrained_cfg(name, vision.pretrained or "")
        whole = open_clip.get_model_config(name)
        config = whole["vision_cfg"] | {"embed_dim": whole["embed_dim"], "quick_gelu": whole.get("quick_gelu", False)}
    else:
        config = dict(vision.config or {})
    # the weights of a tag say what activation they were trained with, whatever the architecture is called
    quick_gelu = config.pop("quick_gelu", False) if not tag else tag.get("quick_gelu", False)
    if not weights:
        return _build(vision, config, quick_gelu, tag)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(vision.seed)
        tower = _build(vision, config, quick_gelu, tag)
    if vision.pretrained is not None:
        file = weights_file(vision.name, vision.pretrained, tag)
        load_weights(tower, file, vision.name or "the config", tower.dropped)
    return tower


def image_pixels(image: Image.Image, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An image as a tower reads it, ``[3, image_size, image_size]``: scaled, and normalized."""
    return normalized(scaled_pixels(image, image_size), mean, std)


def scaled_pixels(image: Image.Image, image_size: int) -> Tensor:
    """An image as RGB, uint8 ``[3, image_size, image_size]``.

    It is resized straight to the square (bicubic; nothing is cropped, the aspect is not kept), as VL-Adapter does it.
    """
    resized = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels ``[..., 3, H, W]`` of 0 to 255 as float32 in [0, 1], less their colour's mean and over its deviation."""
    return (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _check_fields(config: dict[str, Any]) -> None:
    from open_clip import CLIPVisionCfg

    known = {field.name for field in fields(CLIPVisionCfg) if not field.name.startswith("timm_")}
    known |= {"embed_dim", "quick_gelu"}
    if unknown := sorted(config.keys() - known):
        raise ValueError(
            f"config: {unknown[0]!r} is no field of open_clip's CLIPVisionCfg; there are {', '.join(sorted(known))}"
        )
    if "embed_dim" not in config:
        raise ValueError("config: embed_dim is missing, the width of the projected embedding")


def _check_name(name: str) -> None:
    import open_clip

    known = open_clip.list_models()
    if plain_name(name) not in known:
        close = ", ".join(get_close_matches(name, known)) or "open_clip.list_models() has them"
        raise ValueError(f"name: open_clip has no architecture {name!r}; close to it: {close}")
    if "timm_model_name" in open_clip.get_model_config(plain_name(name))["vision_cfg"]:
        raise ValueError(f"name: the vision tower of {name} is timm's; only open_clip's own are read")


def _square(size: int | Sequence[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"image_size: expected a square, got {size}")
    return sides.pop()


def _build(vision: OpenClipVision, config: dict[str, Any], quick_gelu: bool, tag: dict[str, Any]) -> OpenClipTower:
    from open_clip.model import _build_vision_tower

    given = {key: value for key, value in config.items() if key not in ("embed_dim", "quick_gelu")}
    try:
        # CoCa's towers would give their tokens beside the embedding
        visual = _build_vision_tower(config["embed_dim"], given | {"output_tokens": False}, quick_gelu)
    # open_clip does not look at its fields: whatever goes wrong on the way comes from them
    except Exception as error:
        raise ValueError(f"open_clip can build no tower from {config}: {error}") from error
    return OpenClipTower(visual, vision.features, vision.rows, tag.get("mean", CLIP_MEAN), tag.get("std", CLIP_STD))
