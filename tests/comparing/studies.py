"""What tests of studies share: a small study file, and cells that look as if they had run."""

import json
from pathlib import Path
from typing import Any

import yaml

from dora_lightning.comparing.cells import make_cells
from dora_lightning.comparing.folders import CellFolder, open_folders
from dora_lightning.comparing.study import Study, read_study

RANK = "model.init_args.adapter.rank"
METHOD = "model.init_args.adapter.method"


def study_content(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "title": "A study",
        "folder": "runs/study",
        "configs": ["base.yaml"],
        "axes": {
            "method": {"dora": {METHOD: "dora"}, "lora": {METHOD: "lora"}, "full": {METHOD: "full"}},
            "rank": {"option": RANK, "values": [4, 8]},
        },
        "rules": [{"when": {"method": "full"}, "ignore": ["rank"]}],
        "seeds": [0, 1, 2],
        "metrics": {"val/mean/ranking": {"better": "higher", "percent": True}, "val/loss": "lower"},
    }
    return content | changes


def write_study(folder: Path, **changes: Any) -> Path:
    """A study file in a folder that is the current one, beside its config file."""
    (folder / "base.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "trainer": {"max_epochs": 1}}))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study_content(**changes), sort_keys=False))
    return path


def open_study(path: Path) -> tuple[Study, list[CellFolder]]:
    study = read_study(path)
    return study, open_folders(study, make_cells(study))


def pretend(folder: CellFolder, after: dict[str, float], losses: list[float] | None = None, **measured: Any) -> None:
    """Leave in a cell's folder what a finished run leaves there."""
    folder.claim()
    run = folder.path / "version_0"
    (run / "metrics_0").mkdir(parents=True)
    result = {"steps": len(losses or []), "before": None, "after": after, **measured}
    (run / "result.json").write_text(json.dumps(result))
    rows = [f"{step},{loss}," for step, loss in enumerate(losses or [])]
    (run / "metrics_0" / "metrics.csv").write_text("\n".join(["step,train/loss,val/loss", *rows]) + "\n")
