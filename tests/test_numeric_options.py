"""Every option that is a number: nonsense is refused by the option's name, wherever the option stands."""

import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule

import datamodules
import dora_lightning.callbacks
import tasks
from datamodules.vl_bart.image_sets import COCOCaptionFiles, GQAFiles, NLVR2Files, VQAv2Files
from datamodules.vl_bart.visuals import VisualFiles
from dora_lightning import AdapterConfig, backbones
from dora_lightning.backbones.vision_alignment import VisionAlignment
from dora_lightning.extract_features import extract_features
from dora_lightning.llava_parts import LlavaParts
from dora_lightning.mt_bench.commands import mt_bench, mt_bench_judge
from dora_lightning.mt_bench.judge_client import chat_client
from dora_lightning.offline.commands import generate
from dora_lightning.offline.shown import Shown
from dora_lightning.open_clip_tower import OpenClipVision
from dora_lightning.planning.options import PlanOptions
from dora_lightning.task import Task
from dora_lightning.training.schedules import WarmupDecay
from dora_lightning.vl_bart.parts import VLBartParts

PUBLIC = [
    *(getattr(datamodules, name) for name in datamodules.__all__),
    *(getattr(dora_lightning.callbacks, name) for name in dora_lightning.callbacks.__all__),
    *(getattr(tasks, name) for name in tasks.__all__),
    *(getattr(backbones, name) for name in backbones.__all__),
]
KINDS = (LightningDataModule, Callback, Task, torch.nn.Module)
LISTED: list[Callable[..., Any]] = [
    *(AdapterConfig, VisionAlignment, LlavaParts, VLBartParts, OpenClipVision, PlanOptions, WarmupDecay, Shown),
    *(VisualFiles, VQAv2Files, GQAFiles, NLVR2Files, COCOCaptionFiles, datamodules.EvaluationSet),
    *(generate, mt_bench, mt_bench_judge, extract_features, chat_client),
]
# what torch calls with numbers of its own
OF_TORCH = {"last_epoch"}
NEGATIVE = {"feature_layer", "d_initial"}
# what may not be 0: sizes, lengths, rates and counts without which nothing is done
POSITIVE = {
    *("rank", "alpha", "beta", "lr", "epochs", "width", "batch_size", "eval_batch_size", "cutoff_len", "packing_len"),
    *("limit", "limit_train", "limit_eval", "limit_test", "train_images", "questions_per_image", "test_videos"),
    *("questions_per_conversation", "train_videos", "val_videos", "frames", "every", "rows", "grid_rows", "video_rows"),
    *("subtitle_words", "num_beams", "max_new_tokens", "every_n_steps", "total_steps", "feature_dim", "image_orders"),
    *("object_orders", "gpus", "memory", "peak", "bandwidth", "utilization", "tokens", "mean_tokens", "samples"),
    *("timeout", "attempts", "train_size"),
}
NOT_FINITE = [math.nan, math.inf, -math.inf]


def numbers_of(hint: Any) -> set[type]:
    """The kinds of numbers that an annotation allows."""
    if hint in (int, float):
        return {hint}
    union = typing.get_origin(hint) in (UnionType, typing.Union)
    return {kind for part in typing.get_args(hint) for kind in numbers_of(part)} if union else set()


def numeric_options(made: Callable[..., Any]) -> dict[str, type]:
    hints = typing.get_type_hints(made.__init__ if isinstance(made, type) else made)
    found = {name: numbers_of(hint) for name, hint in hints.items() if name != "return"}
    return {name: float if float in kinds else int for name, kinds in found.items() if kinds}


def everything() -> Iterator[Callable[..., Any]]:
    yield from LISTED
    for found in PUBLIC:
        if isinstance(found, type) and issubclass(found, KINDS) and not inspect.isabstract(found):
            yield found


def cases() -> Iterator[Any]:
    for made in everything():
        for option, kind in numeric_options(made).items():
            if option in OF_TORCH:
                continue
            bad: list[Any] = [*NOT_FINITE, True, "three"]
            bad += [-1] if option not in NEGATIVE else []
            bad += [2.5, 1e30, 10**30] if kind is int else []
            bad += [0] if option in POSITIVE else []
            yield pytest.param(made, option, bad, id=f"{made.__name__}-{option}")


def arguments(made: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """Something for each argument that must be given."""
    rows = folder / "rows.json"
    rows.write_text("[]")
    known: dict[str, Any] = {
        "adapter": AdapterConfig(target_modules=["q_proj"]),
        "optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
        "datasets": {"tvqa": None} if made is datamodules.VideoQADataModule else ["pope"],
        "tasks": {},
        "train_file": str(rows),
        "data_dir": str(folder),
        "language": "none" if made is LlavaParts else {},
        "vision": {} if made is LlavaParts else None,
        "target_modules": ["q_proj"],
        "video": "a.mp4" if made is Shown else None,
        "name": "ViT-B-32",
        "key": "",
        "api": "https://example.org/v1",
    }
    parameters = inspect.signature(made).parameters
    wanted = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    useful = [name for name in ("train_file", "video", "name") if name in parameters]
    return {name: known.get(name, "none") for name in [*wanted, *useful]}


@pytest.mark.parametrize(("made", "option", "bad"), list(cases()))
def test_nonsense_is_refused_by_name(made: Callable[..., Any], option: str, bad: list[Any], tmp_path: Path) -> None:
    given = arguments(made, tmp_path)
    for value in bad:
        with pytest.raises((ValueError, TypeError)) as refused:
            made(**given | {option: value})
        said = str(refused.value)
        assert re.search(rf"\b{option}\b", said), f"{option}={value!r}: {said}"
        assert repr(value)[:80] in said, f"{option}={value!r}: {said}"
