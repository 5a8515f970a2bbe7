"""Every shipped study is read by the command's own parser, and cells of the paper's studies are the shipped runs."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from dora_lightning.cli import DoRACLI
from dora_lightning.comparing.cells import Cell, make_cells
from dora_lightning.comparing.checking import parse_cells
from dora_lightning.comparing.study import Study, load_yaml, read_study

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
STUDIES = [path.stem for path in FILES if "axes" in load_yaml(path)]
BASES = [path for path in FILES if path.stem not in STUDIES]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def parsed(configs: Sequence[Path], cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """What ``fit`` would make of each cell, by the cell's name."""
    found: dict[str, dict[str, Any]] = {}

    def keep(cell: Cell, config: Namespace) -> None:
        found[cell.name] = config.as_dict()

    parse_cells(DoRACLI, configs, cells, keep)
    return found


def shipped(folder: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What ``fit`` makes of shipped configs after their protocol."""
    place = ROOT / "configs" / folder
    return parsed(
        [place / "protocol.yaml"],
        [Cell(number, name, {}, None, load_yaml(place / f"{name}.yaml")) for number, name in enumerate(names)],
    )


@cache
def first_cells(name: str) -> tuple[Study, list[Cell], dict[str, dict[str, Any]]]:
    """A study, its cells, and what ``fit`` makes of those of the first seed; the others differ in the seed alone."""
    study = read_study(ROOT / "configs" / "studies" / f"{name}.yaml")
    cells = make_cells(study)
    return study, cells, parsed(study.configs, [cell for cell in cells if cell.seed == cells[0].seed])


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_is_a_run_that_fit_takes(name: str) -> None:
    study, cells, runs = first_cells(name)
    assert len(cells) == len(runs) * max(1, len(study.seeds))
    assert study.folder == Path("runs/studies") / name
    for run in runs.values():
        for option in study.seed_options if study.seeds else ():
            place: Any = run
            for key in option.split("."):
                place = place[key]
            assert place == study.seeds[0]


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
def test_configs_that_studies_begin_with_are_runs_themselves(path: Path) -> None:
    assert parsed([path], [Cell(0, path.stem, {}, None, {})])[path.stem]["model"]


PAPER = [
    ("rank", "dora-rank32-seed42", "commonsense/llama-7b-dora"),
    ("rank", "dora-rank16-seed42", "commonsense/llama-7b-dora-half"),
    ("rank", "lora-rank32-seed42", "commonsense/llama-7b-lora"),
    *(
        ("half-rank", f"{model}-{variant}-seed42", f"commonsense/{model}-{variant}")
        for model in ("llama-7b", "llama-13b", "llama2-7b", "llama3-8b")
        for variant in ("lora", "dora", "dora-half")
    ),
    *(
        ("granularity", f"{model}-{variant}-seed42", f"commonsense/{model}-{variant}")
        for model in ("llama-7b", "llama-13b")
        for variant in ("lora", "dora", "dora-qkv")
    ),
    ("detach", "constant-seed42", "commonsense/llama-7b-dora"),
    *(
        ("samples", f"{method}-samples10000-seed42", f"instruction_tuning/llama2-7b-{method}")
        for method in ("lora", "dora", "vera", "dvora")
    ),
]


def effective(run: dict[str, Any]) -> dict[str, Any]:
    """A run without what a study sets for itself; alpha as it acts."""
    adapter = dict(run["model"]["init_args"]["adapter"])
    adapter["alpha"] = adapter["alpha"] or 2 * adapter["rank"]
    model = {**run["model"]["init_args"], "adapter": adapter}
    trainer = {name: value for name, value in run["trainer"].items() if name not in ("default_root_dir", "devices")}
    return {"model": model, "data": run["data"], "trainer": trainer, "seed": run["seed_everything"]}


@pytest.mark.parametrize("study", ["rank", "half-rank", "granularity", "detach", "samples"])
def test_cells_of_the_paper_are_the_shipped_runs(study: str) -> None:
    wanted = {cell: config for name, cell, config in PAPER if name == study}
    runs = first_cells(study)[2]
    folder = next(iter(wanted.values())).partition("/")[0]
    configs = shipped(folder, list({config.partition("/")[2] for config in wanted.values()}))
    for cell, config in wanted.items():
        assert effective(runs[cell]) == effective(configs[config.partition("/")[2]])


def test_a_logger_that_decides_where_results_go_is_refused() -> None:
    configs = [ROOT / "configs" / "quickstart.yaml"]
    cells = [Cell(0, "quiet", {}, None, {"trainer": {"logger": False}})]
    with pytest.raises(ValueError, match=r"cell 0 \(quiet\): trainer.logger: a cell's results are found in the folder"):
        parsed(configs, cells)
