"""All eight of VL-BART's tasks in their true files, small, with features as published: ``.h5`` and ``.npz``."""

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "datamodules" / "vl_bart"))
from image_examples import color_of, write_coco_captions, write_gqa, write_nlvr2, write_vqav2
from value_examples import write_value

C = 24
IMAGE_SETS = {
    "vqav2": ("vqa", write_vqav2),
    "gqa": ("GQA", write_gqa),
    "nlvr2": ("nlvr", write_nlvr2),
    "coco_captions": ("COCO", write_coco_captions),
}


def write_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of all tasks, and the option ``tasks`` of VLBartDataModule that reads them."""
    tasks: dict[str, dict[str, Any]] = {}
    for name, (place, write) in IMAGE_SETS.items():
        for image_id in write(folder / place):
            write_grid(folder / f"{place}_features", image_id)
        tasks[name] = {"folder": str(folder / place), "features": str(folder / f"{place}_features")}
    for name, ids in write_value(folder / "ann").items():
        for video in ids:
            write_moments(folder / f"{name}_features", video)
        tasks[name] = {"folder": str(folder / "ann"), "features": str(folder / f"{name}_features")}
    return tasks


def write_grid(folder: Path, image_id: str) -> None:
    """VL-Adapter's file of an image: 49 rows at ``{id}/features``; the colour is told by the first number."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(sum(map(ord, image_id)))
    rows = generator.normal(size=(49, C)).astype(np.float32)
    rows[:, 0] = sum(map(ord, color_of(image_id)))
    with h5py.File(folder / f"{image_id}.h5", "w") as file:
        file[f"{image_id}/features"] = rows


def write_moments(folder: Path, video: str) -> None:
    """VALUE's file of a video: a row for each 1.5 seconds at ``features``."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(sum(map(ord, video)))
    np.savez(folder / f"{video}.npz", features=generator.normal(size=(int(generator.integers(2, 80)), C)))
