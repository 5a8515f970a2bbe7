"""VL-BARTs with adapters that something was trained in, their checkpoints, and what they make of inputs."""

from pathlib import Path
from typing import Any

import torch
from tiny_vl_bart import TOWER, features

C = 24
RESNET: dict[str, Any] = {"embed_dim": C, "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
ALL = ["visual_embedding", "biases", "layer_norms", "embeddings"]
TOWERS: dict[str, dict[str, Any] | None] = {"features": None, "vit": TOWER, "resnet": RESNET}


def parts_of(bart: Path, tower: str, kind: str = "grid") -> Any:
    """Parts with one of :data:`TOWERS`."""
    from dora_lightning.open_clip_tower import OpenClipVision
    from dora_lightning.vl_bart import VLBartParts

    config = TOWERS[tower]
    if config is None:
        return VLBartParts(str(bart), feature_dim=C)
    return VLBartParts(str(bart), vision=OpenClipVision(config=config, features=kind))  # type: ignore[arg-type]


def adapted(parts: Any, perturbed: bool = True, **options: Any) -> Any:
    """A DoRAVLBart, all that trains changed as training would."""
    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRAVLBart

    module = DoRAVLBart(parts, AdapterConfig(rank=4, target_modules=["q_proj", "v_proj"]), **options)
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if perturbed and parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def save(module: Any, trainer: Any, path: Path) -> str:
    """A checkpoint of the module as it is."""
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)


def inputs(tower: str, samples: int = 3) -> dict[str, torch.Tensor]:
    """Text, targets, and something to look at."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 200, (samples, 6), generator=generator)
    config = TOWERS[tower]
    if config is None:
        vision = features(samples, 1, 4, C)
    else:
        side = config["image_size"]
        pixels = torch.randn(samples, 3, side, side, generator=generator)
        vision = {"pixel_values": pixels, "image_counts": torch.ones(samples, dtype=torch.int64)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **vision}


def logits(model: Any, tower: str) -> torch.Tensor:
    """What a model says, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**inputs(tower)).logits
