"""How the commands of a guide are run as they stand, on models and data so small that they take seconds."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tiny import save_llama
from tiny_llava import save_image, save_llava
from tiny_open_clip import VIT
from tiny_vl_bart import save_bart

from dora_lightning.cli import main

CPU = [
    "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.max_epochs", "1", "--trainer.strategy", "auto", "--trainer.precision", "32-true",
]  # fmt: skip


class Guide(NamedTuple):
    """A guide whose commands are run.

    Attributes:
        prepare: Makes in the current folder what the guide's user has.
        options: Beginning of a command -> options that put something small in the place of what the guide names.
            Commands that begin with none of these are only read.
    """

    prepare: Callable[[Path], None]
    options: dict[str, list[str]]

    def changed(self, words: list[str]) -> list[str] | None:
        """The command as it is run; None if it is not."""
        found = [begin for begin in self.options if " ".join(words).startswith(begin)]
        return [*words, *self.options[max(found, key=len)]] if found and "--print_config" not in words else None


def _llama(folder: Path) -> None:
    save_llama(folder / "tiny-llama", hidden_size=64, intermediate_size=128)


def _photos(folder: Path) -> None:
    save_llama(folder / "tiny-llama")
    save_llava(folder / "tiny-llava")
    (folder / "photos").mkdir()
    names = [f"{number:04}.jpg" for number in range(24)]
    for number, name in enumerate(names):
        save_image(folder / "photos" / name, number)
    with (folder / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "question", "answer"), *((name, "is it hot?", "it is cold") for name in names)]
        )


def _clips(folder: Path) -> None:
    import numpy as np

    from dora_lightning.videos import write_video

    save_bart(folder / "tiny-bart")
    save_llava(folder / "tiny-llava")
    vision = {name: value for name, value in VIT.items() if name != "embed_dim"}
    tower = {"embed_dim": VIT["embed_dim"], "vision_cfg": vision, "text_cfg": {"layers": 1}}
    (folder / "tiny-clip.json").write_text(json.dumps(tower))
    (folder / "clips").mkdir()
    for seed, name in enumerate(("one", "two")):
        frames = np.random.default_rng(seed).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        write_video(folder / "clips" / f"{name}.mp4", frames, rate=4)


_QUICKSTART = [
    *CPU, "--trainer.max_epochs", "2", "--model.init_args.model_name_or_path", "tiny-llama",
    "--data.init_args.train_size", "32", "--data.init_args.test_size", "10",
]  # fmt: skip
_LLAVA = [*CPU, "--model.init_args.model_name_or_path", "tiny-llava", "--data.init_args.num_workers", "0"]
_BART = [
    *CPU, "--data.init_args.num_workers", "0", "--model.init_args.model_name_or_path.language", "tiny-bart",
    "--model.init_args.model_name_or_path.feature_dim", str(VIT["embed_dim"]),
]  # fmt: skip
_TOWER = ["--model", "tiny-clip.json", "--pretrained", "null", "--random_seed", "0", "--workers", "0"]
_GENERATE = ["--max_new_tokens", "4"]


def _trained(folder: Path) -> None:
    _llama(folder)
    main(["fit", "--config", "configs/quickstart.yaml", *_QUICKSTART])


GUIDES = {
    "first-run": Guide(_llama, {"fit": _QUICKSTART, "test": [], "generate": _GENERATE, "merge": []}),
    "deploying": Guide(_trained, {"merge": [], "generate": _GENERATE}),
    "llava-own-images": Guide(_photos, {"fit": _LLAVA, "generate": _GENERATE, "merge": []}),
    "qdora": Guide(_llama, {}),
    "vl-bart-and-video": Guide(
        _clips,
        {
            "extract-features clips": _TOWER,
            "fit --config clips.yaml": _BART,
            "fit --config configs/llava": _LLAVA,
            "test": [],
            "generate runs/clips": _GENERATE,
        },
    ),
}
