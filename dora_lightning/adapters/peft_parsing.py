"""What PEFT's two files say, checked on its own: no model is looked at here.

Beside PEFT's own, the spellings of the magnitude that others write are read: the official code's ``weight_m_wdecomp``
(``peft_type`` DORA), torchtune's ``magnitude`` and NeMo's ``lora_magnitude``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dora_lightning.adapters.config import by_pattern
from dora_lightning.adapters.initialization import draws_from_weight
from dora_lightning.adapters.peft_format import CONFIG_NAME, TENSORS_NAME, listing
from dora_lightning.files import read_json

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:(?P<low_rank>lora_[AB])(?:\.default)?\.weight"
    r"|lora_embedding_(?P<lookup>[AB])(?:\.default)?"
    r"|vera_(?P<vera>lambda_[bd])(?:\.default)?"
    r"|(?P<magnitude>lora_magnitude_vector|lora_magnitude|magnitude|weight_m_wdecomp)(?:(?:\.default)?\.weight)?)"
)
_BASE_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.weight")
_PAIR = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
# what changes the function of the adapted model in a way that AdapterConfig has no word for
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "enable_lora",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
)
# the others (a randomised SVD, CorDA, LoftQ, ...) belong to base weights that cannot be made again
_INITS = ("gaussian", "orthogonal", "eva", "pissa", "olora")
_DEFAULTS: dict[str, dict[str, Any]] = {  # PEFT's
    "LORA": {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0},
    "VERA": {"r": 256, "projection_prng_key": 0, "vera_dropout": 0.0, "d_initial": 0.1},
}
_DEFAULTS["DORA"] = _DEFAULTS["LORA"]


@dataclass
class Module:
    """What a file says of one module.

    Attributes:
        tensors: as on disk, by our names.
        lookup: whether ``A`` and ``B`` are called as those of an embedding.
        scales_bias: whether the magnitude is torchtune's, ``y = g (W x + s B A x + bias)``.
    """

    vera: bool
    use_dora: bool
    rank: int
    scaling: float
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lookup: bool = False
    scales_bias: bool = False

    @property
    def method(self) -> str:
        """Ours."""
        if self.vera:
            return "vera"
        if not self.use_dora:
            return "lora"
        low_rank = [self.tensors[part] for part in ("lora_A", "lora_B") if part in self.tensors]
        return "dora" if any(tensor.any() for tensor in low_rank) else "magnitude"


@dataclass
class Contents:
    """What a folder holds.

    Attributes:
        options: with PEFT's defaults where they are not given.
        modules: by name.
        pair: VeRA's ``A`` and ``B``.
        base_weights: key in the file -> module and weight; PEFT writes those of embeddings that are targets.
    """

    options: dict[str, Any]
    modules: dict[str, Module] = field(default_factory=dict)
    pair: dict[str, Tensor] = field(default_factory=dict)
    base_weights: dict[str, tuple[str, Tensor]] = field(default_factory=dict)


def parse_folder(folder: Path) -> Contents:
    """Read and check both files.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: an option that cannot be represented exactly, or tensors that do not belong to the options.
    """
    contents = Contents(_read_options(folder))
    _read_tensors(folder, contents)
    return contents


def init_of(options: Mapping[str, Any]) -> str:
    """Our word for ``init_lora_weights``; it only matters where the weights were factored."""
    init = options.get("init_lora_weights")
    return init if isinstance(init, str) and draws_from_weight(init) else "kaiming"


def _read_options(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no PEFT adapter folder: it has no {CONFIG_NAME}")
    options = read_json(path)
    if not isinstance(options, dict):
        raise ValueError(f"{CONFIG_NAME} must hold an object, got a {type(options).__name__}")
    if options.get("peft_type") not in _DEFAULTS:
        raise ValueError(f"peft_type must be one of {', '.join(_DEFAULTS)}, got {options.get('peft_type')!r}")
    if options.get("bias", "none") not in ("none", None):
        raise ValueError(f"bias={options['bias']!r} is not supported: biases are never trained here")
    init = options.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _INITS):
        raise ValueError(
            f"init_lora_weights={init!r} is not supported: such an adapter belongs to a changed base. "
            "Convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    variants = [name for name in options if name.startswith("use_") and name not in ("use_dora", "use_rslora")]
    for name in (*_REFUSED, *variants):
        if options.get(name):
            raise ValueError(f"{name}={options[name]!r} is not supported")
    for name, default in _DEFAULTS[options["peft_type"]].items():
        if not _is_number(options.setdefault(name, default)):
            raise ValueError(f"{name} must be a number, got {options[name]!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = options[name] = options.get(name) or {}
        if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
            raise ValueError(f"{name} must map patterns to numbers, got {patterns!r}")
    if options["peft_type"] == "DORA":
        options["use_dora"] = True
        if options.get("fan_in_fan_out"):
            raise ValueError("fan_in_fan_out=True is not supported: the official code takes another norm there")
    return options


def _read_tensors(folder: Path, contents: Contents) -> None:
    path = folder / TENSORS_NAME
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(
                f"it holds adapter_model.bin, a pickle, which is never read. Convert it, if you trust it: "
                f"safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), '{TENSORS_NAME}')"
            )
        raise FileNotFoundError(f"{folder} is no PEFT adapter folder: it has no {TENSORS_NAME}")
    unexpected: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if "use_dora" not in contents.options:  # torchtune does not write it
                contents.options["use_dora"] = any((m := _KEY.fullmatch(key)) and m["magnitude"] for key in keys)
            for key in keys:
                if not _take(key, file, contents):
                    unexpected.append(key)
    except SafetensorError as error:
        raise ValueError(f"{TENSORS_NAME} could not be read as safetensors: {error}") from error
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"rank_pattern or alpha_pattern: {error}") from error
    if unexpected:
        known = {"VERA": "vera_lambda_d and vera_lambda_b"}.get(
            contents.options["peft_type"],
            f"lora_A, lora_B{' and lora_magnitude_vector' if contents.options['use_dora'] else ' (use_dora is false)'}",
        )
        raise ValueError(
            f"{TENSORS_NAME} holds unexpected tensors: {listing(unexpected)}; known are {known} of modules"
        )
    missing = [
        f"{name}.{part}"
        for name, module in contents.modules.items()
        for part in _expected(contents.options, module)
        if part not in module.tensors
    ]
    if missing:
        raise ValueError(f"{TENSORS_NAME} lacks tensors: {listing(missing)}")
    if not contents.modules:
        raise ValueError(f"{TENSORS_NAME} holds no tensors")


def _take(key: str, file: Any, contents: Contents) -> bool:
    """Put one tensor where it belongs; False if that is nowhere."""
    options, vera = contents.options, contents.options["peft_type"] == "VERA"
    if vera and key in _PAIR:
        contents.pair[_PAIR[key]] = file.get_tensor(key)
        return True
    match = _KEY.fullmatch(key)
    if match is None:
        weight = _BASE_WEIGHT.fullmatch(key)
        if weight is not None:
            contents.base_weights[key] = (weight["module"], file.get_tensor(key))
        return weight is not None
    if bool(match["vera"]) != vera or (match["magnitude"] and not options["use_dora"]):
        return False
    name = match["module"]
    part = match["low_rank"] or match["vera"] or (f"lora_{match['lookup']}" if match["lookup"] else "magnitude")
    if name not in contents.modules:
        contents.modules[name] = Module(vera, bool(options["use_dora"]), *_rank_and_scaling(name, options))
    module = contents.modules[name]
    if part in module.tensors:
        raise ValueError(f"{TENSORS_NAME} holds {part} of {name} twice")
    tensor = file.get_tensor(key)
    # the official code keeps its magnitude in an nn.Linear(1, out)
    module.tensors[part] = tensor.squeeze(-1) if match["magnitude"] == "weight_m_wdecomp" else tensor
    module.lookup |= match["lookup"] is not None
    module.scales_bias |= match["magnitude"] == "magnitude"
    return True


def _expected(options: Mapping[str, Any], module: Module) -> tuple[str, ...]:
    if module.vera:
        return "lambda_d", "lambda_b"
    if options["peft_type"] == "DORA" and module.tensors.keys() == {"magnitude"}:
        return ("magnitude",)  # Wdecompose_target_modules
    return ("lora_A", "lora_B", "magnitude") if module.use_dora else ("lora_A", "lora_B")


def _rank_and_scaling(name: str, options: Mapping[str, Any]) -> tuple[int, float]:
    rank = by_pattern(name, options["rank_pattern"], options["r"])
    alpha = by_pattern(name, options["alpha_pattern"], options.get("lora_alpha", rank))
    if not isinstance(rank, int) or rank < 1 or not alpha > 0:
        raise ValueError(f"r must be a whole number of at least 1 and lora_alpha above 0, got {rank} and {alpha}")
    return rank, alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
