"""Extract features: what a frozen CLIP tower makes of a folder of images or videos, one record for each file.

Batches are the same ones however often a run is interrupted. What is missing is computed beside what it would have been
computed with in the first place, so the result is the same bit for bit.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from dora_lightning.feature_batches import PixelBatches, VisualFile, batches_of, find_files, is_video, measure_file
from dora_lightning.feature_files import SETTINGS_FILE, FeatureFolder
from dora_lightning.feature_rows import VIDEO_EVERY
from dora_lightning.files import read_json
from dora_lightning.files.growing import check_writable
from dora_lightning.messages import check_real, check_whole
from dora_lightning.open_clip_tower import POOLED, OpenClipTower, OpenClipVision, build_tower
from dora_lightning.terminal import say


def extract_features(
    source: str,
    output: str,
    model: str = "RN101",
    pretrained: str | None = "openai",
    kind: Literal["grid", "pooled"] = "grid",
    every: float = VIDEO_EVERY,
    batch_size: int = 64,
    workers: int = 4,
    device: str = "auto",
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    on_bad_file: Literal["raise", "skip"] = "raise",
    random_seed: int | None = None,
    exif_rotation: bool = True,
) -> None:
    """Write a CLIP tower's features of images or videos, one file each; an interrupted run goes on where it was.

    Args:
        source: folder with images or videos, sub-folders included.
        output: folder for the features; source/train/dog.jpg becomes output/train/dog.safetensors. It remembers what
            made them, and refuses features of another model or other settings.
        model: open_clip architecture, or a JSON file with an open_clip model config.
        pretrained: tag of open_clip's weights, or a file of weights.
        kind: grid for the last feature map, n * n rows; pooled for the projected embedding, one row. Videos have one
            row a frame, which is pooled.
        every: seconds from one frame of a video to the next.
        batch_size: images and frames that go through the tower at a time.
        workers: processes that decode, at most as many as there are processors; 0 decodes in this one.
        device: auto, cpu, cuda, cuda:1, ...; auto is the GPU if there is one.
        dtype: of the numbers in the files.
        on_bad_file: raise stops at the first file that cannot be read; skip leaves such files out, and ends with an
            error that lists them.
        random_seed: features of an untrained tower drawn from this seed, for tests; with pretrained null.
        exif_rotation: turn photos upright as their EXIF data say; false leaves them as they are stored, as VL-Adapter's
            features were made.

    Raises:
        FileNotFoundError: there is no such folder, or no such weights.
        ValueError: an option is wrong, two files have one name, the output holds other features, or files are bad.
    """
    check_real(above=0, every=every)
    check_whole(1, batch_size=batch_size)
    check_whole(0, workers=workers)
    check_whole(0, none="pretrained weights", random_seed=random_seed)
    paths = find_files(Path(source).expanduser())
    if kind != POOLED and any(is_video(path) for path in paths.values()):
        raise ValueError(f"kind: videos have one row a frame, choose {POOLED}; there are videos in {source}")
    check_writable(Path(output).expanduser() / SETTINGS_FILE)
    vision = _vision(model, pretrained, kind, random_seed)
    chosen = _device(device)
    tower = build_tower(vision).eval()
    folder = FeatureFolder(output)
    made_by = _settings(vision, tower, dtype)
    if any(is_video(path) for path in paths.values()):
        made_by["every"] = every
    if exif_rotation and not all(is_video(path) for path in paths.values()):
        made_by["exif_rotation"] = True  # left out where photos are not turned, as before there was a choice
    folder.claim(made_by)

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, processors)
    console = Console()
    bad: dict[Path, str] = {}
    with _progress(console) as progress, ThreadPoolExecutor(max(1, workers)) as threads:
        files: list[VisualFile] = []
        measured = threads.map(lambda item: measure_file(item[0], item[1], every), paths.items())
        for found in progress.track(measured, len(paths), description="Looking at files"):
            if isinstance(found, VisualFile):
                files.append(found)
            elif on_bad_file == "raise":
                raise ValueError(found.reason)
            else:
                bad[found.path] = found.reason
        present = set(folder.ids)
        wanted = {number for number, file in enumerate(files) if file.name not in present}
        run = _Run(files, wanted, batch_size, tower.to(chosen), workers, on_bad_file == "raise", exif_rotation)
        written: list[Future[None]] = []
        for name, features in run.records(progress):
            # a disk that takes its time to write for good is waited for beside the next batch
            written.append(threads.submit(folder.write, name, features, getattr(torch, dtype)))
            while len(written) > batch_size:
                written.pop(0).result()
        for future in written:
            future.result()
    bad |= run.bad
    there = len(files) - len(wanted)
    line = f"Features of {len(wanted) - len(run.bad)} files: {folder.path}" + (
        f" ({there} were there)" if there else ""
    )
    say(line, console)
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(paths)} files were left out:\n" + "\n".join(bad[path] for path in sorted(bad))
        )


class _Run:
    """Goes through the batches in which something is missing."""

    def __init__(
        self,
        files: list[VisualFile],
        wanted: set[int],
        batch_size: int,
        tower: OpenClipTower,
        workers: int,
        strict: bool,
        exif_rotation: bool,
    ) -> None:
        self.bad: dict[Path, str] = {}
        self._files = files
        self._wanted = wanted
        self._tower = tower
        self._strict = strict
        self._device = next(tower.parameters()).device
        self._batches = [
            batch for batch in batches_of(files, batch_size) if any(piece.file in wanted for piece in batch)
        ]
        self._loader = DataLoader(
            PixelBatches(files, self._batches, tower, exif_rotation),
            batch_size=None,
            num_workers=workers,
            pin_memory=self._device.type == "cuda",
        )

    def records(self, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Id and features ``[rows, C]`` of each file that is wanted and not bad."""
        task = progress.add_task("Extracting", total=sum(self._files[number].frames for number in self._wanted))
        parts: dict[int, list[Tensor]] = defaultdict(list)
        for batch, (pixels, reasons) in zip(self._batches, self._loader, strict=True):
            for number in reasons.keys() & self._wanted:
                if self._strict:
                    raise ValueError(reasons[number])
                self.bad.setdefault(self._files[number].path, reasons[number])
            with torch.inference_mode():
                features = self._tower(pixels.to(self._device)).cpu()
            for piece, part in zip(batch, features.split([piece.stop - piece.start for piece in batch]), strict=True):
                if piece.file not in self._wanted:
                    continue
                progress.advance(task, piece.stop - piece.start)
                parts[piece.file].append(part.flatten(0, 1))
                file = self._files[piece.file]
                if piece.stop == file.frames:
                    whole = torch.cat(parts.pop(piece.file))
                    if file.path not in self.bad:
                        yield file.name, whole


def _vision(model: str, pretrained: str | None, kind: Any, random_seed: int | None) -> OpenClipVision:
    if (pretrained is None) == (random_seed is None):
        raise ValueError("give either pretrained weights or, for an untrained tower, pretrained null and a random_seed")
    seed = random_seed or 0
    if not model.endswith(".json"):
        return OpenClipVision(name=model, pretrained=pretrained, features=kind, seed=seed)
    path = Path(model).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"model: no open_clip model config at {path}")
    try:
        whole = read_json(path)
        config = whole["vision_cfg"] | {"embed_dim": whole["embed_dim"], "quick_gelu": whole.get("quick_gelu", False)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: {path} is no open_clip model config, with embed_dim and vision_cfg as in open_clip's "
            f"model_configs: {error!r}"
        ) from error
    return OpenClipVision(config=config, pretrained=pretrained, features=kind, seed=seed)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} is not there: {str(error).splitlines()[0]}") from error
    return device


def _settings(vision: OpenClipVision, tower: OpenClipTower, dtype: str) -> dict[str, Any]:
    """What the numbers depend on. The weights are known by themselves, wherever they came from."""
    from open_clip.transformer import QuickGELU

    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):  # batch norms' statistics among them
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return {
        "model": vision.name or vision.config,
        "weights": digest.hexdigest()[:16],
        "quick_gelu": any(isinstance(module, QuickGELU) for module in tower.modules()),
        "kind": vision.features,
        "rows": tower.rows,
        "feature_dim": tower.feature_dim,
        "image_size": tower.image_size,
        "mean": tower.mean,
        "std": tower.std,
        "dtype": dtype,
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
