"""GGUF files as folders of safetensors.

A file is converted once, since dequantising it and rebuilding its tokenizer takes most of a minute and
``transformers`` refuses to save such a model.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dora_lightning.model_cache import cache_folder, cached, digest, file_stamp


def convert_gguf(path: Path) -> Path:
    """Folder of safetensors and tokenizer with the weights of a GGUF file, made on first use.

    Raises:
        ModuleNotFoundError: what reads such files is not installed.
        ValueError: the file could not be read.
    """
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest(file_stamp(path))}"
    return cached(folder, lambda made: _convert(path, made, folder))


def _convert(path: Path, folder: Path, kept_as: Path) -> None:
    if missing := [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f'reading GGUF files needs {" and ".join(missing)}: pip install "dora-lightning[quickstart]"'
        )
    rank_zero_info(f"Converting {path.name} to safetensors (once; kept in {kept_as})")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # the reader of a file that was cut short raises anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) could not be read as a GGUF model: {reason}; it may be damaged or "
            "cut short, or of an architecture that transformers does not read"
        ) from error
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
