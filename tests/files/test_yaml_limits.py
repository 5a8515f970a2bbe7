"""YAML that stands for far more than it says."""

from pathlib import Path

import pytest
from tiny import RunCLI

from dora_lightning.files.yaml_limits import check_yaml

ONES = ", ".join("1" * 10)
BOMB = f"a0: &a0 [{ONES}]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "a: &a {b: *a}"])
def test_aliases_that_grow_without_end(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^a\.yaml: YAML that stands for more than 200,000 values with its aliases written out"
    ):
        check_yaml(text, "a.yaml")


@pytest.mark.parametrize("text", ["[" * 20_000, "- " * 5_000, "{a: " * 5_000])
def test_what_is_nested_too_deeply(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a\.yaml: .*nested too deeply"):
        check_yaml(text, "a.yaml")


@pytest.mark.parametrize("text", ["a: &a [1, 2]\nb: [*a, *a]", "*", "a: *b", "a: b*c", "[1, 2", "a" * 10**6, ""])
def test_ordinary_texts_pass(text: str) -> None:
    check_yaml(text, "a.yaml")


@pytest.mark.parametrize("arguments", [("fit", "--config"), ("generate", "--config"), ("compare",)])
def test_the_command_says_so_at_once(
    run_cli: RunCLI, tmp_path: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bomb.yaml").write_text(BOMB)
    with pytest.raises(SystemExit) as ended:
        run_cli(*arguments, tmp_path / "bomb.yaml")
    said = f"{ended.value.code}{capsys.readouterr().err}"
    assert "stands for more than 200,000 values" in said
    assert "bomb.yaml" in said
    assert "Traceback" not in said
