"""Names from data and options stand in tables as they are."""

import io

import pytest
from rich.console import Console
from torch import tensor

from dora_lightning.analyzing.records import Record
from dora_lightning.analyzing.report import report
from dora_lightning.mt_bench.scores import ModelScores, score_table
from dora_lightning.terminal import PlainTable, printable, say
from dora_lightning.training.run_report import held_out_table
from tasks.tables import data_set_table
from tasks.vqa_table import results_table

NAMES = ["[/]", "[v2] a", "[red]b", ":smile:", "a\x1b[31mb\x07", "half \ud83d"]


def printed(shown: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]  # it is the one above


@pytest.mark.parametrize("name", NAMES)
def test_every_table_shows_names_as_they_are(name: str) -> None:
    one = tensor(0.5)
    plain = PlainTable(name)
    plain.add_column(name, name)
    plain.add_row(name)
    tables = [
        plain,
        data_set_table(name, {"accuracy": name}, {f"{name}/accuracy": one}),
        results_table({f"mmbench/{name}/accuracy": one, f"{name}/accuracy": one}),
        score_table([ModelScores(name, 5.0, {1: 5.0}, {name: 5.0}, 1, 0)]),
        held_out_table({f"val/{name}/accuracy": 0.5}, {f"val/{name}/accuracy": 0.5}),
        report([Record(3, name, name, 0, "dora", 0.5, 0.25)]),
    ]
    for table in tables:
        text = printed(table)
        assert printable(name) in text
        assert "\x1b" not in text
        text.encode()


def test_a_line_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        say(f"Written: {name}")
    assert capsys.readouterr().out.split("\n")[:-1] == [f"Written: {printable(name)}" for name in NAMES]
    assert printable("two\nlines \u202e caf\u00e9") == "two\nlines \\u202e caf\u00e9"
