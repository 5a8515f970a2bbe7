"""Whether the tensors of a checkpoint make up the adapter that its config describes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dora_lightning.adapters import AdapterConfig
from dora_lightning.adapters.initialization import draws_from_weight
from dora_lightning.adapters.patterns import named_by

_PARTS = {
    "dora": {"lora_A", "lora_B", "magnitude"},
    "lora": {"lora_A", "lora_B"},
    "vera": {"lambda_d", "lambda_b"},
    "dvora": {"lambda_d", "lambda_b", "magnitude"},
    "magnitude": {"magnitude"},
}
_KNOWN = {"lora_A", "lora_B", "magnitude", "lambda_d", "lambda_b", "init_A", "init_B"}


def check_complete(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are fewer than the config needs, which would merge into something that was never trained.

    Args:
        config: of the adapter.
        tensors: name inside the adapted model -> trained tensor.

    Raises:
        ValueError: there are none, a module lacks one, or a target of the config has none; the message names it.
    """
    if not tensors:
        raise ValueError("the checkpoint holds no trained weights: its state_dict is empty")
    if config.method == "full":
        return
    modules: dict[str, set[str]] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part in _KNOWN:
            modules.setdefault(module, set()).add(part)
    if not modules:
        raise ValueError(f"the checkpoint holds no tensors of the adapter, method {config.method!r}")
    expected = _PARTS[config.method]
    if config.method in ("dora", "lora") and draws_from_weight(config.init):
        expected = expected | {"init_A", "init_B"}
    for module, parts in modules.items():
        if parts != expected and not (parts == {"magnitude"} and config.magnitude_only_modules):
            parts_of = (
                f"it holds {', '.join(sorted(parts))}; method {config.method!r} has {', '.join(sorted(expected))}"
            )
            raise ValueError(f"the checkpoint does not hold the whole adapter of {module}: {parts_of}")
    for option in ("target_modules", "magnitude_only_modules"):
        patterns = getattr(config, option)
        if patterns == "all-linear":
            continue
        for pattern, found in named_by(modules, patterns):
            if not found and not config.exclude_modules:
                raise ValueError(f"the checkpoint holds no adapter of {pattern!r}, which {option} names")
