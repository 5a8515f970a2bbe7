"""How the cost of DoRA's training step grows: with the rank, the tokens, the width, and the number of blocks.

    python benchmarks/growth.py [--sweeps rank tokens width blocks] [--seconds 360] [--json FILE] [--plot FILE]

One adapted layer, or for ``blocks`` a stack of LLaMA's blocks with adapters on q, k, v, up and down. Forward and
backward with the gradient of the input, for: the frozen layer alone, our LoRA, our DoRA, PEFT's DoRA. They take turns
in each round and ratios are of times of the same round, as in ``layer.py``; ``peak`` is the most that one step has
allocated at once, without parameters. Each point has an equal share of ``--seconds``, but at least three rounds, which
on the largest shapes take longer. PEFT is left out of a sweep from the size on where one step of it took more than
``--peft-seconds``; the output says so.

fp32 on a CPU, bf16 on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from layer import of_peft, ours, paired_ratios, synchronize, time_in_turns, training_step, wrap
from measuring import peak_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from dora_lightning.files import write_text_atomically
from dora_lightning.plots import COLORS, MARKERS, new_figure, save_figure

SIZES = {
    "rank": [4, 8, 16, 32, 64, 128, 256, 512],
    "tokens": [256, 1024, 4096, 16384, 65536],
    "width": [512, 1024, 2048, 4096, 8192],
    "blocks": [1, 2, 4, 8],
}
RATIOS = (("ours DoRA", "ours LoRA"), ("ours DoRA", "PEFT DoRA"), ("ours DoRA", "frozen"))
VARIANTS = ("frozen", "ours LoRA", "ours DoRA", "PEFT DoRA")
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass
class Point:
    size: int
    rounds: int
    median_ms: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]
    """Name -> lower quartile, median, upper quartile of the paired ratios."""
    peak_mib: dict[str, float]


@dataclass
class Sweep:
    name: str
    fixed: str
    points: list[Point] = field(default_factory=list)
    left_out: str = ""
    """Where PEFT was left out, and why."""


def main() -> None:
    options = read_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    dtype = "bf16" if options.device == "cuda" else "fp32"
    setting = f"{options.device} ({name}), {dtype}, torch {torch.__version__}, PEFT {peft.__version__}"
    print(setting)
    seconds = options.seconds / sum(len(getattr(options, sweep)) for sweep in options.sweeps)
    sweeps = []
    for sweep in options.sweeps:
        sweeps.append(run(sweep, sorted(getattr(options, sweep)), seconds, options))
        show(sweeps[-1])
        if options.json:  # after each: what was measured is there if a later one fails
            result = {"setting": setting, "sweeps": [asdict(sweep) for sweep in sweeps]}
            write_text_atomically(Path(options.json), json.dumps(result, indent=2))
    if options.plot:
        plot(sweeps, setting, Path(options.plot))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=SIZES, default=list(SIZES))
    for sweep, sizes in SIZES.items():
        parser.add_argument(f"--{sweep}", nargs="+", type=int, default=sizes, metavar="N", help=f"sizes of {sweep}")
    parser.add_argument("--at-rank", type=int, default=32, help="rank of the other sweeps")
    parser.add_argument("--at-tokens", type=int, default=1024, help="tokens of the other sweeps")
    parser.add_argument("--at-width", type=int, default=1024, help="inputs and outputs of the other sweeps")
    parser.add_argument(
        "--block-width", type=int, default=512, help="width of the blocks; their MLP has 2.75 times that"
    )
    parser.add_argument("--seconds", type=float, default=360, help="time of the whole run, about")
    parser.add_argument("--peft-seconds", type=float, default=20, help="most that one step of PEFT may take")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--plot", metavar="FILE", help="also draw them there")
    return parser.parse_args()


def run(sweep: str, sizes: list[int], seconds: float, options: argparse.Namespace) -> Sweep:
    at = {"rank": options.at_rank, "tokens": options.at_tokens, "width": options.at_width}
    if sweep == "blocks":
        at["width"] = options.block_width
    result = Sweep(sweep, ", ".join(f"{name} {value}" for name, value in at.items() if name != sweep))
    for size in sizes:
        make, x = (blocks if sweep == "blocks" else linear)(at | {sweep: size}, options.device)
        point, slow = measure(size, make, x, seconds, not result.left_out, options)
        result.points.append(point)
        if slow:
            result.left_out = f"PEFT is left out from {sweep} {size} on: one step of it took {slow:.0f} s"
    return result


def linear(at: dict[str, int], device: str) -> tuple[Callable[[str], nn.Module], Tensor]:
    """Makes one layer in the variant that is asked for, and the layer's input."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": dtype_on(device)}
    base = nn.Linear(at["width"], at["width"], bias=False, **options)
    x = torch.randn(at["tokens"], at["width"], **options)

    def make(variant: str) -> nn.Module:
        return adapted(wrap(base), variant, at["rank"], ("layer",))

    return make, x


def blocks(at: dict[str, int], device: str) -> tuple[Callable[[str], nn.Module], Tensor]:
    """Makes a stack of blocks in the variant that is asked for, and its input ``[1, tokens, width]``."""
    width = at["width"]
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=at["blocks"],
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=at["tokens"],
        use_cache=False,
    )

    def make(variant: str) -> nn.Module:
        torch.manual_seed(0)
        model = LlamaModel(config).to(device, dtype_on(device))
        return Stack(adapted(model, variant, at["rank"], TARGETS))

    return make, torch.randn(1, at["tokens"], width, device=device, dtype=dtype_on(device))


class Stack(nn.Module):
    """Blocks as a layer: hidden states in, hidden states out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


def adapted(model: nn.Module, variant: str, rank: int, targets: tuple[str, ...]) -> nn.Module:
    model.requires_grad_(False)
    if variant == "frozen":
        return model
    whose, method = variant.split()
    if whose == "ours":
        return ours(model, method.lower(), rank, targets)
    return of_peft(model, True, rank, targets)


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def measure(
    size: int,
    make: Callable[[str], nn.Module],
    x: Tensor,
    seconds: float,
    with_peft: bool,
    options: argparse.Namespace,
) -> tuple[Point, float]:
    """The point, and the seconds of a step of PEFT if they are too many, else 0."""
    device, slow = options.device, 0.0
    x.requires_grad_()
    dy = torch.randn_like(x)  # layers and stacks have as many outputs as inputs
    steps: dict[str, Callable[[], None]] = {}
    warm_round = 0.0
    for variant in VARIANTS if with_peft else VARIANTS[:-1]:
        step = training_step(make(variant), x, dy, micro_batches=1)
        if device == "cuda":
            step()  # the first one chooses kernels
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        taken = time.perf_counter() - started
        if variant == "PEFT DoRA" and taken > options.peft_seconds:
            slow = taken
        else:
            steps[variant] = step
            warm_round += taken
    rounds = max(3, min(200, int(seconds / warm_round)))
    times = time_in_turns(steps, rounds, device)
    point = Point(
        size,
        rounds,
        median_ms={name: 1000 * statistics.median(taken) for name, taken in times.items()},
        ratios={f"{a} / {b}": paired_ratios(times[a], times[b]) for a, b in RATIOS if b in times},
        peak_mib={name: peak_bytes(step, device) / 2**20 for name, step in steps.items()},
    )
    return point, slow


def show(sweep: Sweep) -> None:
    table = Table(title=f"{sweep.name} ({sweep.fixed}): ms per step / peak MiB; paired ratios of time (quartiles)")
    table.add_column(sweep.name, justify="right")
    names = [*VARIANTS, *(f"{a} / {b}" for a, b in RATIOS)]
    for name in (*names, "rounds"):
        table.add_column(name, justify="right")
    for point in sweep.points:
        cells = {name: f"{ms:.4g} / {point.peak_mib[name]:.4g}" for name, ms in point.median_ms.items()}
        cells |= {name: f"{mid:.2f} ({low:.2f}-{high:.2f})" for name, (low, mid, high) in point.ratios.items()}
        table.add_row(str(point.size), *(cells.get(name, "-") for name in names), str(point.rounds))
    console = Console(width=170)
    console.print(table)
    if sweep.left_out:
        console.print(sweep.left_out)


def plot(sweeps: list[Sweep], setting: str, path: Path) -> None:
    """Above the ratios of time with their quartiles, below milliseconds, a column for each sweep."""
    figure, axes = new_figure(2 * len(sweeps), columns=len(sweeps), title=f"cost of a training step, {setting}")
    for column, sweep in enumerate(sweeps):
        above, below = axes[column], axes[len(sweeps) + column]
        for series, (a, b) in enumerate(RATIOS):
            points = [point for point in sweep.points if f"{a} / {b}" in point.ratios]
            quartiles = [point.ratios[f"{a} / {b}"] for point in points]
            middle = [mid for _, mid, _ in quartiles]
            spread = [[mid - low for low, mid, _ in quartiles], [high - mid for _, mid, high in quartiles]]
            style: dict[str, Any] = {"color": COLORS[series], "marker": MARKERS[series], "markersize": 4}
            sizes = [point.size for point in points]
            above.errorbar(sizes, middle, spread, capsize=2, label=f"{a} / {b}", **style)
        for series, variant in enumerate(VARIANTS):
            points = [point for point in sweep.points if variant in point.median_ms]
            style = {"color": COLORS[3 + series], "marker": MARKERS[3 + series], "markersize": 4}
            below.plot([p.size for p in points], [p.median_ms[variant] for p in points], label=variant, **style)
        above.set_title(f"{sweep.name} ({sweep.fixed})")
        above.axhline(1, color="#888888", linewidth=0.8)
        above.set_ylabel("ratio of time")
        below.set_ylabel("milliseconds a step")
        below.set_yscale("log")
        for axis in (above, below):
            axis.set_xscale("log", base=2)
            axis.set_xlabel(sweep.name)
    axes[0].legend()
    axes[len(sweeps)].legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
