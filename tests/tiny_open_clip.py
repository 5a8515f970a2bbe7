"""Small CLIPs of open_clip, and this library's towers of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RESNET = {"embed_dim": 16, "layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 32}
VIT = {"embed_dim": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
CLIP_TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}


def whole_clip(config: dict[str, Any], **options: Any) -> Any:
    """A CLIP of random weights with both towers, batch norms and zero-initialised weights included."""
    from open_clip import CLIP

    torch.manual_seed(1)
    vision = {key: value for key, value in config.items() if key != "embed_dim"}
    model = CLIP(config["embed_dim"], vision, CLIP_TEXT, **options)
    for module in model.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def save(weights: dict[str, Tensor], path: Path) -> str:
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
    return str(path)


def images(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def build(**options: Any) -> Any:
    from dora_lightning.open_clip_tower import OpenClipVision, build_tower

    return build_tower(OpenClipVision(**options)).eval()


def refused(**options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        build(**options)
    return str(error.value)


def last_map(visual: nn.Module, pixels: Tensor) -> Tensor:
    """What ``layer4`` makes while the whole tower runs, ``[N, C, h, w]``."""
    seen: list[Tensor] = []
    handle = visual.get_submodule("layer4").register_forward_hook(lambda module, given, made: seen.append(made))
    visual(pixels)
    handle.remove()
    return seen[0]
