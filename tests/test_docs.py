"""The pages say what is so: Python and guides run, commands are read by the real parsers, links lead somewhere."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doc_pages import PAGES, ROOT, blocks, links, named_configs, page_commands
from doc_runs import GUIDES
from jsonargparse import auto_parser

from dora_lightning.cli import OFFLINE_VERBS, TRAINER_VERBS, DoRACLI, main
from dora_lightning.planning.planner import make_plan
from dora_lightning.planning.report import as_json
from dora_lightning.planning.settings import parse_command

ON_LLAMA = ["--config", "configs/commonsense/protocol.yaml", "--config", "configs/commonsense/llama-7b-dora.yaml"]
MY = """
from lightning.pytorch import LightningDataModule, LightningModule
class Module(LightningModule): pass
class Data(LightningDataModule): pass
"""
pytestmark = pytest.mark.filterwarnings("ignore")


class Reader(DoRACLI):
    """Reads a command line as the command does, and does nothing."""

    def instantiate_classes(self) -> None:
        """Nothing is built: models and data need not be there."""

    def before_instantiate_classes(self) -> None:
        """No checkpoint is looked at."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(scope="module")
def read_fit() -> Callable[[list[str]], Any]:
    """The parser of the verbs that train and test: made once, which is the slow part."""
    parser = Reader(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]).parser
    return lambda words: parser.parse_args(words)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it: a clone without anything but its configs."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT), *sys.path])
    (tmp_path / "my.py").write_text(MY)
    monkeypatch.setattr(sys, "argv", ["dora-lightning"])
    monkeypatch.delenv("DORA_LIGHTNING_TRACEBACK", raising=False)
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return tmp_path


def with_configs(words: list[str], run: list[str]) -> list[str]:
    """``words`` with what stands for a config: ``...`` for any run's, a run's own for that of the fit before."""
    filled: list[str] = []
    for word in words:
        if filled[-1:] == ["--config"] and (word == "..." or word.endswith("/config.yaml")):
            filled[-1:] = run
        elif word != "...":
            filled.append(word)
    return filled if {"--config", "--model"} & set(filled) else [filled[0], *run, *filled[1:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_read_by_the_real_parsers(page: Path, folder: Path, read_fit: Callable[[list[str]], Any]) -> None:
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text)
    run = ON_LLAMA
    for words in page_commands(page):
        verb = words[0]
        assert verb.startswith("-") or verb in OFFLINE_VERBS or verb in TRAINER_VERBS, words
        if len(words) == 1:
            continue  # a mention
        if verb in ("fit", "validate", "test", "predict"):
            words = with_configs([word for word in words if word != "--print_config"], run)
            if verb == "fit":
                run = [part for at, word in enumerate(words) if word == "--config" for part in (word, words[at + 1])]
            read_fit(words)
        elif verb == "plan":
            parse_command(DoRACLI, with_configs(words, run)[1:])
        elif verb == "compare":
            main([*words, "--list"])
        elif verb in OFFLINE_VERBS:
            auto_parser(OFFLINE_VERBS[verb], as_positional=True).parse_args(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python blocks in the order of the page; files that it tells to write; commands, if a tiny model can stand in."""
    guide = GUIDES.get(page.stem)
    if guide is not None:
        guide.prepare(folder)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.file is not None and guide is not None:
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
        for words in block.commands if guide is not None else []:
            if (changed := guide.changed(words)) is not None:
                main(changed)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "guides").glob("*.md")), ids=lambda page: page.name)
def test_something_of_each_guide_is_run_or_read(page: Path) -> None:
    assert page_commands(page) or any(block.language == "python" for block in blocks(page))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_configs_are_there(page: Path) -> None:
    missing = [link for link in links(page) if not (page.parent / link).exists()]
    missing += [path for path in named_configs(page) if not any(ROOT.glob(path))]
    assert not missing


PAPER = ROOT / "docs" / "guides" / "reproducing-the-paper.md"
PLANNED = re.findall(r"^\| `(\w+/[\w-]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAPER.read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", PLANNED, ids=lambda row: row[0])
def test_planned_memory_is_what_plan_says(row: tuple[str, ...], folder: Path) -> None:
    config, *printed = row
    words = ["--config", f"configs/{Path(config).parent}/protocol.yaml", "--config", f"configs/{config}.yaml"]
    words += ["--samples", "170300"] if config.startswith("commonsense") else []
    outcomes = as_json(make_plan(*parse_command(DoRACLI, words)))["outcomes"]
    plain, checkpointed = [outcome["memory"]["total"] / 2**30 for outcome in outcomes]
    (hours,) = [outcome["hours"] for outcome in outcomes if outcome["config"]]
    told = f"| `{config}` | {plain:.1f} | {checkpointed:.1f} | {hours:.1f} |"
    assert [plain, checkpointed, hours] == pytest.approx([float(number) for number in printed], rel=0.1, abs=0.05), told


def test_there_are_planned_runs() -> None:
    assert len(PLANNED) >= 9
