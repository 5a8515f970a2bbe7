"""What a config file says of a run, as the command line's own parser reads it, without building anything."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from dora_lightning.adapters import AdapterConfig
from dora_lightning.files import json_rows
from dora_lightning.planning.options import PlanOptions

_COVERED = {"DoRALlama": 1, "DoRALlamaDPO": 2}
"""Backbones that can be planned, and how many sequences they read of a sample."""
_NOT_COVERED = {
    "DoRALlava": "its vision tower, projector and image tokens",
    "DoRAVLBart": "its encoder-decoder and vision tower",
}
_MOMENTS = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "SGD": 0, "Adagrad": 1}


@dataclass(frozen=True)
class RunSettings:
    """What a plan needs of a config.

    Attributes:
        model: folder, hub id or package.
        adapter: how it is adapted.
        dtype: of the frozen base while it trains; ``auto`` for as stored.
        quantization: of the base, or None.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``.
        checkpointing: whether activations are checkpointed.
        compute_bytes: bytes of a number under autocast; None for those of the base.
        sequences: sequences that are read of a sample: two of a pair of answers.
        batch_size: samples, or packed rows, in a device's batch.
        tokens: tokens in a row, at most.
        packed: whether rows hold several samples.
        devices: devices of all nodes; None if the config leaves that open.
        strategy: the Trainer's, by name.
        accumulate: batches per optimiser step.
        moments: numbers that the optimiser keeps per parameter.
        samples: samples to train on in an epoch; None if unknown.
        epochs: how often; -1 for no limit.
        max_steps: optimiser steps, -1 for no limit.
    """

    model: str
    adapter: AdapterConfig
    dtype: str
    quantization: str | None
    attention: str
    checkpointing: bool
    compute_bytes: int | None
    sequences: int
    batch_size: int
    tokens: int
    packed: bool
    devices: int | None
    strategy: str
    accumulate: int
    moments: int
    samples: int | None
    epochs: int
    max_steps: int


def parse_command(cli: type[LightningCLI], args: list[str]) -> tuple[RunSettings, PlanOptions]:
    """Read config files and options as ``fit`` would, and the options of ``plan``.

    Args:
        cli: the command's LightningCLI, whose parser is used.
        args: ``--config``, the overrides that ``fit`` knows, and :class:`PlanOptions`.

    Raises:
        ValueError: the config is of a model that cannot be planned, or a value is out of range.
    """

    class Reader(cli):  # type: ignore[valid-type,misc]  # a class that is an argument
        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            return super().init_parser(**kwargs | {"prog": "dora-lightning plan"})

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            parser.add_class_arguments(PlanOptions, None)

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_args(args)
            self.config.seed_everything = False  # nothing is drawn

        def instantiate_classes(self) -> None:
            """Nothing is built: the data need not be there, nor a device."""

    config: Namespace = Reader(args, run=False).config
    options = PlanOptions(**{name: config[name] for name in PlanOptions.__dataclass_fields__})
    return read_settings(config, options), options


def read_settings(config: Namespace, options: PlanOptions) -> RunSettings:
    """What a plan needs of a parsed config.

    Raises:
        ValueError: the model is of a class that cannot be planned, or batch size or length are not known.
    """
    model, data, trainer = config.model.init_args, config.data.get("init_args", Namespace()), config.trainer
    backbone = _backbone(config)
    sharded = _callback(trainer, "ShardedTraining")
    packing, cutoff = data.get("packing_len"), data.get("cutoff_len")
    if not isinstance(packing, int):
        # samples that share the rows of their batch take no more cells than without
        packing = None
    batch_size, tokens = options.batch_size or data.get("batch_size"), options.tokens or packing or cutoff
    for name, value in (("batch_size", batch_size), ("tokens", tokens)):
        if not value:
            raise ValueError(f"the config's data module has no {name}: give --{name}")
    precision = str(trainer.precision or "32-true")
    dtype = model.dtype
    if precision in ("bf16-true", "16-true"):
        dtype = "bfloat16" if precision.startswith("bf16") else "float16"
    if sharded is not None and sharded.base_dtype is not None:
        dtype = sharded.base_dtype
    return RunSettings(
        model=model.model_name_or_path,
        adapter=AdapterConfig(**model.adapter.as_dict()),
        dtype=dtype,
        quantization=model.quantization,
        attention=model.attn_implementation or "sdpa",
        checkpointing=model.gradient_checkpointing or (sharded is not None and sharded.activation_checkpointing),
        compute_bytes=2 if precision in ("bf16-mixed", "16-mixed") else None,
        sequences=_COVERED[backbone],
        batch_size=batch_size,
        tokens=tokens,
        packed=packing is not None,
        devices=_devices(trainer),
        strategy=_strategy(trainer),
        accumulate=trainer.accumulate_grad_batches,
        moments=_moments(model.optimizer),
        samples=options.samples or _samples(data),
        epochs=_epochs(trainer),
        max_steps=trainer.max_steps,
    )


def _backbone(config: Namespace) -> str:
    name = config.model.class_path.rpartition(".")[2]
    if name in _NOT_COVERED:
        raise ValueError(
            f"plan does not cover {name}: {_NOT_COVERED[name]} are not counted. "
            "It plans DoRALlama and DoRALlamaDPO; a language model alone can be planned as one of these"
        )
    if name not in _COVERED:
        raise ValueError(f"plan knows {' and '.join(_COVERED)}, and not what a {name} computes")
    return name


def _callback(trainer: Namespace, name: str) -> Namespace | None:
    callbacks = trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if getattr(callback, "class_path", "").rpartition(".")[2] == name:
            return callback.init_args
    return None


def _strategy(trainer: Namespace) -> str:
    strategy = trainer.strategy
    return strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]


def _devices(trainer: Namespace) -> int | None:
    devices, nodes = trainer.devices, trainer.num_nodes
    if isinstance(devices, list):
        return len(devices) * nodes
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()]) * nodes
    return int(text) * nodes if text.isdigit() and int(text) else None


def _epochs(trainer: Namespace) -> int:
    """As Lightning takes it: 1,000 where neither epochs nor steps are limited."""
    if trainer.max_epochs is not None:
        return trainer.max_epochs
    return 1000 if trainer.max_steps == -1 and trainer.max_time is None else -1


def _moments(optimizer: Namespace) -> int:
    name = optimizer.class_path.rpartition(".")[2]
    if name == "SGD" and optimizer.init_args.get("momentum"):
        return 1
    if name not in _MOMENTS:
        raise ValueError(f"plan does not know what {name} keeps per parameter; it knows {', '.join(_MOMENTS)}")
    return _MOMENTS[name]


def _samples(data: Namespace) -> int | None:
    """As the options say, else as many as a file of training rows has, less those for validation."""
    path = data.get("train_file")
    rows = None
    if path is not None and Path(path).is_file():
        with suppress(ValueError):  # of a table, or a file that `fit` refuses, the plan tells the time of a step alone
            rows = sum(1 for _ in json_rows(Path(path)))
            rows = max(1, rows - (data.get("val_size") or 0))
    limits = [value for value in (rows, data.get("limit_train"), data.get("train_size")) if isinstance(value, int)]
    return min(limits, default=None)
