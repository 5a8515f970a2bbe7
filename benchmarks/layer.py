"""Forward and backward of one adapted layer: DoRA and LoRA, ours and PEFT's, on the same data in one process.

    python benchmarks/layer.py [--shapes 2048x1024x1024 ...] [--dropout P] [--repeats N] [--json FILE]

A shape is tokens x in x out. The variants take turns in each round, in an order that rotates, and ratios are of times
of the same round, so that a slow moment of the machine hits all of them. Before each step ``lora_B`` is written in
place, as an optimiser would: DoRA pays for its norm in every step. Memory is of one step: ``kept`` is what autograd
holds between forward and backward, ``peak`` the most that is allocated at once, both without parameters. Our layers
keep their output, as in a LLaMA (``reuse_output``); ``ours DoRA, own z`` keeps the product, as elsewhere.

torchtune's DoRA takes part where it can be imported. torchtune 0.6.1, its last release, needs
``torchao.dtypes.nf4tensor``, which torchao 0.18 no longer has; beside it, it runs with the torch of today::

    pip install --no-deps --target DIR torchtune tiktoken "torchao>=0.16,<0.18"
    PYTHONPATH=DIR python benchmarks/layer.py

With ``--dropout`` the low-rank path drops its input. LoRA, our DoRA and torchtune's compute ``g (W x + s B A x~)``, one
product with the base weight; PEFT's DoRA, and ours with ``exact_dropout``, which is measured then too, compute
``W x + (g - 1) W x~ + g s B A x~``: two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import peft
import torch
from measuring import peak_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dora_lightning.adapters import AdapterConfig, adapter_layers, inject_adapters

SHAPES = ("256x1024x1024", "2048x1024x1024", "2048x576x1536", "2048x4096x4096", "4096x2048x5504")
RATIOS = (
    ("ours DoRA", "ours LoRA"),
    ("ours DoRA", "PEFT DoRA"),
    ("ours LoRA", "PEFT LoRA"),
    ("PEFT DoRA", "PEFT LoRA"),
    ("ours DoRA, exact", "PEFT DoRA"),
    ("ours DoRA", "torchtune DoRA"),
    ("ours DoRA, own z", "ours LoRA"),
)


@dataclass
class Result:
    shape: str
    micro_batches: int
    median_ms: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]
    """Name -> lower quartile, median, upper quartile of the paired ratios."""
    kept_mib: dict[str, float]
    peak_mib: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="TOKENSxINxOUT")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0, help="probability, on the low-rank path")
    parser.add_argument("--repeats", type=int, help="rounds per shape; by default as many as fit --seconds")
    parser.add_argument("--seconds", type=float, default=20, help="time per shape if --repeats is not given")
    parser.add_argument("--micro-batches", type=int, default=1, help="forward and backward passes per optimiser step")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    dtype = "bf16" if device == "cuda" else "fp32"
    setting = f"{device} ({name}), {dtype}, rank {options.rank}, torch {torch.__version__}, PEFT {peft.__version__}"
    if options.dropout:
        setting += f", dropout {options.dropout:g}"
    try:
        import torchtune  # noqa: F401
    except ImportError as error:
        print(f"torchtune is left out: {error}")
    else:
        setting += f", torchtune {version('torchtune')}"
    print(setting)
    results = [measure(shape, device, options) for shape in options.shapes]
    show(results)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"setting": setting, "results": [asdict(result) for result in results]}, file, indent=2)


def measure(shape: str, device: str, options: argparse.Namespace) -> Result:
    tokens, in_features, out_features = (int(size) for size in shape.split("x"))
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = nn.Linear(in_features, out_features, bias=False).to(device, dtype)
    x = torch.randn(tokens, in_features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, out_features, device=device, dtype=dtype)
    rank, dropout = options.rank, options.dropout
    layers = {
        "ours LoRA": ours(wrap(base), "lora", rank, dropout=dropout),
        "ours DoRA": ours(wrap(base), "dora", rank, dropout=dropout),
        "ours DoRA, own z": ours(wrap(base), "dora", rank, reuse=False, dropout=dropout),
        "PEFT LoRA": of_peft(wrap(base), False, rank, dropout=dropout),
        "PEFT DoRA": of_peft(wrap(base), True, rank, dropout=dropout),
    }
    if dropout:
        layers["ours DoRA, exact"] = ours(wrap(base), "dora", rank, dropout=dropout, exact_dropout=True)
    if "torchtune" in sys.modules:
        layers["torchtune DoRA"] = torchtune_layer(base, rank, dropout)
    steps = {name: training_step(layer, x, dy, options.micro_batches) for name, layer in layers.items()}
    started = time.perf_counter()
    for _ in range(2):
        for step in steps.values():
            step()
    synchronize(device)
    warm_round = (time.perf_counter() - started) / 2
    times = time_in_turns(steps, options.repeats or max(5, min(200, int(options.seconds / warm_round))), device)
    kept_mib = {name: kept_bytes(layer, x) / 2**20 for name, layer in layers.items()}
    for step in steps.values():
        step()  # leaves things as a step does, which the forward pass above does not
    return Result(
        shape,
        options.micro_batches,
        median_ms={name: 1000 * statistics.median(taken) for name, taken in times.items()},
        ratios={f"{a} / {b}": paired_ratios(times[a], times[b]) for a, b in RATIOS if a in times and b in times},
        kept_mib=kept_mib,
        peak_mib={name: peak_bytes(step, device) / 2**20 for name, step in steps.items()},
    )


def time_in_turns(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step in each round; who begins a round rotates."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            started = time.perf_counter()
            steps[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - started)
    return times


def paired_ratios(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios of times of the same round."""
    low, mid, high = statistics.quantiles([p / q for p, q in zip(a, b, strict=True)], n=4)
    return low, mid, high


def ours(
    model: nn.Module,
    method: str,
    rank: int,
    targets: Sequence[str] = ("layer",),
    reuse: bool = True,
    **options: Any,
) -> nn.Module:
    inject_adapters(model, AdapterConfig(method=method, rank=rank, target_modules=list(targets), **options))
    for _, layer in adapter_layers(model):
        layer.reuse_output = reuse
    perturb(model)
    return model


def of_peft(
    model: Any, use_dora: bool, rank: int, targets: Sequence[str] = ("layer",), dropout: float = 0.0
) -> nn.Module:
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), use_dora=use_dora, lora_dropout=dropout
    )
    peft_model = peft.get_peft_model(model, config)
    perturb(peft_model)
    return peft_model.base_model.model


def torchtune_layer(base: nn.Linear, rank: int, dropout: float) -> nn.Module:
    from torchtune.modules.peft import DoRALinear

    layer = DoRALinear(base.in_features, base.out_features, rank, 2.0 * rank, dropout).to(base.weight.device)
    layer.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    layer.initialize_dora_magnitude()
    perturb(layer)
    return layer


def wrap(base: nn.Linear) -> nn.Module:
    copy = nn.Linear(base.in_features, base.out_features, bias=False).to(base.weight)
    copy.load_state_dict(base.state_dict())
    model = nn.Sequential()
    model.add_module("layer", copy)
    return model


def perturb(model: nn.Module) -> None:
    """Away from the initial state, where ``B`` is zero and the gain one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))


def training_step(layer: nn.Module, x: Tensor, dy: Tensor, micro_batches: int) -> Callable[[], None]:
    trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    lora_Bs = [parameter for name, parameter in layer.named_parameters() if "lora_b" in name.lower()]

    def step() -> None:
        for parameter in [x, *trainable]:
            parameter.grad = None
        with torch.no_grad():
            for lora_B in lora_Bs:
                lora_B.add_(1e-6)
        for _ in range(micro_batches):
            x.grad = None
            with precision(x):
                y = layer(x)
            y.backward(dy)

    return step


def precision(x: Tensor) -> torch.autocast | nullcontext:
    return torch.autocast("cuda", torch.bfloat16) if x.is_cuda else nullcontext()


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of distinct memory that one forward pass keeps for backward, other than parameters and the input."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [x, *layer.parameters()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision(x):
        y = layer(x)
    total = sum(kept.values())
    del y
    return total


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def show(results: list[Result]) -> None:
    console = Console(width=140)
    table = Table(title="milliseconds per step (median); MiB kept for backward / peak")
    table.add_column("tokens x in x out")
    for name in results[0].median_ms:
        table.add_column(name, justify="right")
    for result in results:
        cells = [
            f"{ms:.1f}\n{result.kept_mib[name]:.1f} / {result.peak_mib[name]:.1f}"
            for name, ms in result.median_ms.items()
        ]
        table.add_row(result.shape, *cells)
    console.print(table)
    table = Table(title="paired ratios of time: median (lower to upper quartile)")
    table.add_column("tokens x in x out")
    for name in results[0].ratios:
        table.add_column(name, justify="right")
    for result in results:
        cells = [f"{mid:.3f} ({low:.2f} to {high:.2f})" for low, mid, high in result.ratios.values()]
        table.add_row(result.shape, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
