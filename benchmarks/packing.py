"""Supervised tokens per second in training: rows of several samples against padded batches, on the same samples.

    python benchmarks/packing.py MODEL [FILE ...] [--rounds N] [--json FILE]

MODEL is a folder, hub id, GGUF file or ``package:NAME``; FILEs hold rows of instructions (Alpaca's fields or chat
messages), by default rows are made up whose lengths are spread as instruction sets spread them (log-normal, median 90
tokens). Each way of making batches holds about ``--tokens`` tokens a batch, padding included, so that the memory is the
same: ``packed``; ``grouped``, padded samples of like length; and ``shuffled``, padded samples of any length. In each
round every way trains on as many batches, in an order that rotates, and rates are of the round's supervised tokens, so
that a slow moment of the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from datamodules import IGNORE, InstructionDataModule
from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlama

WORDS = [
    "which",
    "one",
    "of",
    "the",
    "many",
    "things",
    "that",
    "people",
    "know",
    "about",
    "water",
    "and",
    "light",
    "would",
    "you",
    "name",
    "first",
    "to",
    "a",
    "child",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--rows", type=int, default=1000, help="most rows to take, or to make up")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a batch, padding included")
    parser.add_argument("--cutoff-len", type=int, default=512)
    parser.add_argument("--batches", type=int, default=4, help="batches of each way in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--method", default="dora")
    parser.add_argument("--attention", help="sdpa, flash_attention_2 or eager; the model's default")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    options = parser.parse_args()
    options.tokens = max(options.tokens, options.cutoff_len)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    setting = (
        f"{device.type} ({name}), {dtype}, {options.model}, {options.method}, {options.tokens} tokens a batch, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(setting)
    rows = read_rows(options)
    ways = {way: batches_of(way, rows, options) for way in ("packed", "grouped", "shuffled")}
    module = DoRALlama(
        options.model,
        AdapterConfig(method=options.method, rank=16, target_modules="all-linear"),
        dtype=dtype,
        attn_implementation=options.attention,
    )
    module.configure_model()
    module.to(device)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)

    counts = {way: [counted(batch) for batch in batches] for way, batches in ways.items()}
    filled = {way: sum(real for _, real, _ in c) / sum(all_ for _, _, all_ in c) for way, c in counts.items()}
    streams = {way: cycle(batches) for way, batches in ways.items()}
    for stream in streams.values():
        train(module, optimizer, islice(stream, 1), device)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    names = list(ways)
    for round_ in range(options.rounds):
        shift = round_ % len(names)
        for way in names[shift:] + names[:shift]:
            rates[way].append(train(module, optimizer, islice(streams[way], options.batches), device))
    results = summary(rates, filled)
    show(results)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"setting": setting, "results": results}, file, indent=2)


def read_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    draw = random.Random(0)
    if options.files:
        rows = [row for file in options.files for row in json.loads(Path(file).read_text())]
        return draw.sample(rows, min(options.rows, len(rows)))
    lengths = [max(4, int(draw.lognormvariate(4.1, 0.8))) for _ in range(options.rows)]
    texts = [" ".join(draw.choices(WORDS, k=length)) for length in lengths]
    return [{"instruction": text[: len(text) // 3], "output": text[len(text) // 3 :]} for text in texts]


def batches_of(way: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One epoch of batches, cut to so many samples that each holds about ``options.tokens`` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        file.write_text(json.dumps(rows))
        arguments: dict[str, Any] = {"template": options.template, "cutoff_len": options.cutoff_len, "seed": 0}
        if way == "packed":
            data = InstructionDataModule(
                options.model, str(file), batch_size=1, packing_len=options.tokens, on_bad_row="skip", **arguments
            )
            data.setup("fit")
            return list(data.train_dataloader())
        # as many samples as fill the tokens, averaged over the epoch
        for batch_size in range(1, options.tokens):
            data = InstructionDataModule(
                options.model,
                str(file),
                batch_size=batch_size,
                group_by_length=way == "grouped",
                on_bad_row="skip",
                **arguments,
            )
            data.setup("fit")
            batches = list(data.train_dataloader())
            if statistics.mean(batch["input_ids"].numel() for batch in batches) >= options.tokens:
                return batches
    raise ValueError("the rows do not fill a batch")


def counted(batch: dict[str, Any]) -> tuple[int, int, int]:
    """Supervised tokens, tokens, and tokens with padding."""
    supervised = int((batch["labels"][:, 1:] != IGNORE).sum())
    return supervised, int(batch["attention_mask"].sum()), batch["input_ids"].numel()


def train(
    module: DoRALlama, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, Any]], device: torch.device
) -> float:
    """Supervised tokens per second of some steps."""
    synchronize(device)
    started, supervised = time.perf_counter(), 0
    for batch in batches:
        moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        loss, tokens = module.loss(moved)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        supervised += tokens
    synchronize(device)
    return supervised / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def summary(rates: dict[str, list[float]], filled: dict[str, float]) -> dict[str, Any]:
    """Quartiles of the rates, and of the packed rate over each other one of the same round."""
    results: dict[str, Any] = {}
    for way, values in rates.items():
        low, middle, high = statistics.quantiles(values, n=4)
        results[way] = {"tokens_per_s": middle, "quartiles": [low, high], "filled": filled[way]}
        if way != "packed":
            ratios = [packed / value for packed, value in zip(rates["packed"], values, strict=True)]
            results[way]["packed_over_this"] = statistics.quantiles(ratios, n=4)
    return results


def show(results: dict[str, Any]) -> None:
    table = Table(title="supervised tokens per second, median (lower to upper quartile)")
    for name in ("batches", "tokens/s", "not padding", "packed is faster by"):
        table.add_column(name, justify="left" if name == "batches" else "right")
    for way, result in results.items():
        low, high = result["quartiles"]
        ratios = result.get("packed_over_this")
        table.add_row(
            way,
            f"{result['tokens_per_s']:.0f} ({low:.0f} to {high:.0f})",
            f"{100 * result['filled']:.0f} %",
            f"{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})" if ratios else "",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
