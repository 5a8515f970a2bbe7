"""Study files: the cells they make, and what is said of mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import METHOD, RANK, open_study, pretend, write_study

from dora_lightning.comparing.cells import Cell, make_cells
from dora_lightning.comparing.study import read_study


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells_of(path: Path) -> dict[str, Cell]:
    return {cell.name: cell for cell in make_cells(read_study(path))}


def test_combinations_that_are_one_run_are_one_cell(folder: Path) -> None:
    cells = cells_of(write_study(folder))
    names = ["dora-rank4", "dora-rank8", "lora-rank4", "lora-rank8", "full"]
    assert list(cells) == [f"{name}-seed{seed}" for seed in range(3) for name in names]
    assert cells["full-seed1"].labels == {"method": "full", "rank": None}
    assert cells["full-seed1"].options == {
        "model": {"init_args": {"adapter": {"method": "full"}}},
        "seed_everything": 1,
    }
    assert cells["lora-rank8-seed2"].options["model"]["init_args"]["adapter"] == {"method": "lora", "rank": 8}
    assert [cell.number for cell in cells.values()] == list(range(15))


def test_a_later_axis_that_undoes_an_earlier_one_collapses_too(folder: Path) -> None:
    methods = {"dora": {METHOD: "dora"}, "full": {METHOD: "full", RANK: 16}}
    axes = {"rank": {"option": RANK, "values": [4, 8]}, "method": methods}
    assert list(cells_of(write_study(folder, axes=axes, rules=[], seeds=[5]))) == [
        "rank4-dora-seed5",
        "full-seed5",
        "rank8-dora-seed5",
    ]


def test_rules_and_exclusions(folder: Path) -> None:
    rate = "model.init_args.optimizer.init_args.lr"
    rules = [{"when": {"method": "dora", "rank": [4]}, "set": {rate: 0.1}}]
    exclude = [{"method": "full"}, {"method": "lora", "rank": 8}]
    path = write_study(folder, rules=rules, exclude=exclude, seeds=[0], overrides={rate: 0.2, "data": {"a": 1}})
    cells = cells_of(path)
    assert list(cells) == ["dora-rank4-seed0", "dora-rank8-seed0", "lora-rank4-seed0"]
    rates = [cell.options["model"]["init_args"]["optimizer"]["init_args"]["lr"] for cell in cells.values()]
    assert rates == [0.1, 0.2, 0.2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, "a study has no `axis`; did you mean `axes`?"),
        ({"configs": ["bass.yaml"]}, "bass.yaml: no such file"),
        ({"exclude": [{"method": "loar"}]}, "exclude: method has no `loar`; did you mean `lora`?"),
        ({"rules": [{"when": {"method": "full"}, "ignore": ["ranks"]}]}, "has no `ranks`; did you mean `rank`?"),
        ({"rules": [{"when": {"method": "full"}}]}, "does nothing"),
        ({"metrics": {"val/loss": "smaller"}}, "must be `higher` or `lower`, got 'smaller'"),
        ({"seeds": [0, 1, 0]}, "seeds has one of them twice"),
        ({"overrides": {"trainer.default_root_dir": "x"}}, "each cell has a folder of its own"),
        ({"axes": {"rank": {"option": RANK}}}, "must have an option and a list of values"),
        ({"axes": {"rank": {"option": RANK, "values": [4, 4]}}, "rules": []}, "rank has a value twice"),
        ({"axes": {"a": {"x y": {RANK: 1}, "x_y": {RANK: 2}}}, "rules": []}, "two cells would have the folder x_y"),
        ({"overrides": {"model": "m"}}, "lies in model, which is set to 'm'"),
        ({"exclude": [{"method": ["dora", "lora", "full"]}]}, "leaves no cell"),
    ],
)
def test_mistakes_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    path = write_study(folder, **changes)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        make_cells(read_study(path))
    assert message in str(caught.value)


def test_a_folder_never_serves_another_cell(folder: Path) -> None:
    _, folders = open_study(write_study(folder))
    pretend(folders[0], {"val/mean/ranking": 0.5, "val/loss": 1.0})
    # what does not touch the cell leaves it usable: more seeds, other metrics, a comment in the config
    grown = write_study(folder, seeds=[0, 1, 2, 3], metrics={"val/loss": "lower"})
    (folder / "base.yaml").write_text("# a comment\n" + (folder / "base.yaml").read_text())
    assert [f.state for f in open_study(grown)[1]][:2] == ["done", "waiting"]
    # another option of the cell
    with pytest.raises(ValueError, match="holds a cell of that name") as caught:
        open_study(write_study(folder, overrides={"model.init_args.adapter.alpha": 8}))
    assert "options.model.init_args.adapter.alpha was None and is 8" in str(caught.value)
    # another content of the config file
    path = write_study(folder)
    (folder / "base.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "trainer": {"max_epochs": 2}}))
    with pytest.raises(ValueError, match=r"configs\[0\].trainer.max_epochs was 1 and is 2"):
        open_study(path)


def test_a_folder_with_a_run_of_somebody_else_is_refused(folder: Path) -> None:
    run = folder / "runs/study/dora-rank4-seed0/version_0"
    run.mkdir(parents=True)
    (run / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run that no study made"):
        open_study(write_study(folder))


def test_the_options_file_is_the_cell_as_a_config_file(folder: Path) -> None:
    _, folders = open_study(write_study(folder, overrides={"trainer.max_steps": 3}))
    folders[3].claim()
    written = yaml.safe_load(folders[3].options_file.read_text())
    assert written["trainer"] == {"max_steps": 3, "default_root_dir": "runs/study/lora-rank8-seed0"}
    assert written["resume"] is True
    assert written["model"] == {"init_args": {"adapter": {"method": "lora", "rank": 8}}}
    assert folders[3].arguments == ["fit", "--config", "base.yaml", "--config", str(folders[3].options_file)]
    assert json.loads((folders[3].path / "cell.json").read_text())["labels"] == {"method": "lora", "rank": "8"}
