"""The training step of LLaMA's shapes on one GPU: time, model FLOPs utilisation, memory; and the elementwise passes.

    python benchmarks/gpu.py [--models llama-7b llama3-8b] [--layers N] [--tokens 4096] [--json FILE]

Random weights are made on the device (no files, no network): bf16, ``--rows`` samples of ``--tokens`` tokens, all
supervised, adapters on q, k, v, up and down, AdamW on the adapters. Variants, each with and without recomputation of
blocks, each in a process of its own:

    base               forward and backward of the frozen model, with the gradient of its inputs; no optimiser
    ours, PEFT LoRA    ours, PEFT DoRA
    ours DoRA compiled each block under torch.compile; seconds of compiling are apart

The loss is ``causal_lm.supervised_loss`` for all. ``device`` measures the rates of a large product and of a copy, and
the passes over ``[tokens, out]`` that DoRA adds: the gain applied, and its gradient.

MFU is operations of the model (recomputation not counted) per second, as a share of the device's published peak where
``planning.devices`` knows it, and of the measured product. Operations are counted by ``planning.operations``; those of
the base are of the gradient of activations through all blocks. After each process the JSON file is written anew, so a
run that is cut short keeps what it has. ``--device cpu`` with a small model tries every path without a GPU::

    python benchmarks/gpu.py --device cpu --models smollm2-135m --layers 1 --tokens 64 --steps 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import peak_bytes, run_in_turns
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters

from dora_lightning.adapters import AdapterConfig, functional, inject_adapters
from dora_lightning.backbones.causal_lm import enable_recomputation, supervised_loss
from dora_lightning.files import write_text_atomically
from dora_lightning.planning.activations import Step
from dora_lightning.planning.blocks import Linear, Sizes, read_sizes
from dora_lightning.planning.devices import DEVICES
from dora_lightning.planning.models import SHAPES, planned_model
from dora_lightning.planning.operations import norm_operations, step_operations

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
VARIANTS = ("base", "ours LoRA", "PEFT LoRA", "ours DoRA", "PEFT DoRA", "ours DoRA compiled")
DEVICE = "device"


def main() -> None:
    options = read_options()
    if options.variant:
        try:
            result = elementwise(options) if options.variant == DEVICE else measure(options)
        except Exception as error:  # out of memory, say: the other variants are measured all the same
            result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        print(json.dumps(result))
        return
    runs = [DEVICE]
    for model in options.models:
        for recompute in options.recompute:
            runs += [f"{model}/{recompute}/{variant}" for variant in options.variants]
    setting = {key: value for key, value in vars(options).items() if key not in ("json", "variant")}
    results: dict[str, dict[str, Any]] = {}
    for run in runs:
        results[run] = run_in_turns([run], 1)[run][0]
        print(f"{run}: {results[run].get('error') or results[run].get('step_ms') or 'done'}", flush=True)
        if options.json:
            write_text_atomically(Path(options.json), json.dumps({"setting": setting, "runs": results}, indent=2))
    show(results, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-7b", "llama3-8b"])
    parser.add_argument("--layers", type=int, help="blocks; all of the model's by default")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sample")
    parser.add_argument("--rows", type=int, default=1, help="samples in a batch")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="measured, after two that are not")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--recompute", nargs="+", choices=("kept", "recomputed"), default=["kept", "recomputed"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu with a small model tries the script, see --help")
    return options


# One training step ---------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One variant, in this process."""
    shape, recompute, variant = options.variant.split("/")
    device = options.device
    torch.manual_seed(0)
    model = build(shape, variant, recompute == "recomputed", options)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None
    ids = torch.randint(3, model.config.vocab_size, (options.rows, options.tokens), device=device)
    mask = torch.ones_like(ids)

    def step() -> None:
        supervised_loss(model, ids, mask, ids)[0].backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    weights = torch.cuda.memory_allocated() if device == "cuda" else sum(p.nbytes for p in model.parameters())
    first = seconds_of(step, device)  # with compiling
    seconds_of(step, device)
    times = [seconds_of(step, device) for _ in range(options.steps)]
    peak = peak_bytes(step, device)
    model_operations, all_operations = operations(shape, variant, recompute == "recomputed", options)
    return {
        "step_ms": 1000 * statistics.median(times),
        "steps_ms": [1000 * seconds for seconds in times],
        "first_step_s": first,
        "peak_gib": peak / 2**30,
        "weights_gib": weights / 2**30,
        "trainable": sum(parameter.numel() for parameter in trainable),
        # 0 and 0 where nothing is compiled
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "model_operations": model_operations,
        "operations_with_recomputation": all_operations,
    }


def build(shape: str, variant: str, recompute: bool, options: argparse.Namespace) -> Any:
    """The model on the device, its weights random, adapted as the variant says; in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    config = LlamaConfig(**sizes, max_position_embeddings=options.tokens, use_cache=False)
    with torch.device(options.device):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    if recompute:
        enable_recomputation(model)
    if variant == "base":
        model.enable_input_require_grads()
        return model.train()
    whose, method = variant.split()[:2]
    if whose == "ours":
        inject_adapters(model, adapter_config(method.lower(), options.rank))
    else:
        import peft

        chosen = peft.LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS, use_dora=method == "DoRA"
        )
        model = peft.get_peft_model(model, chosen).base_model.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # away from zero, where no gradient reaches A
                parameter.normal_(std=1e-3)
    if variant.endswith("compiled"):
        for block in model.base_model.layers:
            block.compile()
    return model.train()


def adapter_config(method: str, rank: int) -> AdapterConfig:
    return AdapterConfig(method=method, rank=rank, target_modules=TARGETS)


def operations(shape: str, variant: str, recompute: bool, options: argparse.Namespace) -> tuple[int, int]:
    """Of one step: of the model as such, and with what is computed again."""
    method = "dora" if "DoRA" in variant else "lora"
    sizes = sizes_of(shape, method, options)
    if variant == "base":
        sizes = frozen(sizes)
    step = Step(rows=options.rows, length=options.tokens)
    norms = norm_operations(sizes)
    return (
        step_operations(sizes, step) + norms,
        step_operations(sizes, replace(step, checkpointing=recompute)) + norms,
    )


def sizes_of(shape: str, method: str, options: argparse.Namespace) -> Sizes:
    sizes = read_sizes(planned_model(shape, adapter_config(method, options.rank), "bfloat16"))
    return replace(sizes, blocks=sizes.blocks[: options.layers])


def frozen(sizes: Sizes) -> Sizes:
    """Without adapters; the gradient flows to the input, as if the embedding trained."""
    plain = tuple(
        replace(block, linears=tuple((name, Linear(layer.inputs, layer.outputs)) for name, layer in block.linears))
        for block in sizes.blocks
    )
    return replace(sizes, blocks=plain, embedding=replace(sizes.embedding, method="full"))


# The device, and DoRA's elementwise passes ---------------------------------------------------------------------------


def elementwise(options: argparse.Namespace) -> dict[str, Any]:
    """Rates of the device, and of the passes over ``[tokens, out]`` that DoRA adds to LoRA."""
    device, on_gpu = options.device, options.device == "cuda"
    size = 8192 if on_gpu else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / median_seconds(lambda: a @ b, device)
    source = torch.randn(2**29 if on_gpu else 2**22, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)
    passes = []
    tokens = options.rows * options.tokens
    for model in options.models:
        (block, *_) = sizes_of(model, "dora", options).blocks
        for outputs in sorted({layer.outputs for _, layer in block.linears if layer.method == "dora"}):
            z, dy = (torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16) for _ in range(2))
            gain = torch.rand(outputs, device=device)
            for name, run in passes_over(z, dy, gain).items():
                # two matrices pass through memory in each: read z and write y, or read dy and z
                rate = 2 * z.nbytes / median_seconds(run, device)
                passes.append({"model": model, "pass": name, "tokens": tokens, "outputs": outputs, "bytes_per_s": rate})
    return {
        "name": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "published_flops": published_peak(torch.cuda.get_device_name()) if on_gpu else None,
        "product_flops": product,
        "copy_bytes_per_s": copied,
        "passes": passes,
    }


def passes_over(z: Tensor, dy: Tensor, gain: Tensor) -> dict[str, Callable[[], Any]]:
    y = torch.empty_like(z)
    compiled = torch.compile(lambda z, gain: (z * gain).to(z.dtype))
    return {
        "y = g z": lambda: functional._scale(z, gain, out=y),
        "y = g z, compiled": lambda: compiled(z, gain),
        "dg = sum dy z": lambda: functional._sum_of_products(dy, z),
    }


def published_peak(name: str) -> float | None:
    """Dense bf16 operations a second, if the device is known."""
    plain = name.upper().replace(" ", "")
    return next((1e12 * device.tflops for known, device in DEVICES.items() if known in plain), None)


def median_seconds(run: Callable[[], Any], device: str, repeats: int = 20) -> float:
    for _ in range(3):
        run()
    return statistics.median(seconds_of(run, device) for _ in range(repeats))


def seconds_of(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# Report --------------------------------------------------------------------------------------------------------------


def show(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    console = Console(width=170)
    device = results[DEVICE]
    if "error" in device:
        console.print(f"the device's rates are not known: {device['error']}")
        return
    peak, rate = device["published_flops"], device["product_flops"]
    published = f"{peak / 1e12:.0f} TFLOP/s" if peak else "not in planning.devices"
    console.print(
        f"{device['name']}, torch {device['torch']}: bf16 product {rate / 1e12:.4g} TFLOP/s (published peak: "
        f"{published}), copy {device['copy_bytes_per_s'] / 1e9:.4g} GB/s read and written"
    )
    table = Table(title="passes over matrices of tokens x out")
    for name in ("model", "pass", "tokens x out", "GB/s", "of a copy"):
        table.add_column(name)
    for item in device["passes"]:
        shape, speed = f"{item['tokens']} x {item['outputs']}", item["bytes_per_s"]
        share = f"{speed / device['copy_bytes_per_s']:.0%}"
        table.add_row(item["model"], item["pass"], shape, f"{speed / 1e9:.4g}", share)
    console.print(table)
    for model in options.models:
        for recompute in options.recompute:
            console.print(steps_table(model, recompute, results, peak, rate))


def steps_table(
    model: str, recompute: str, results: dict[str, dict[str, Any]], peak: float | None, rate: float
) -> Table:
    """Roofline: the operations, the time they take at the measured product's rate, and the time that they took."""
    table = Table(title=f"{model}, activations {recompute}")
    columns = ("variant", "ms", "/ base", "TFLOP (+ recomputed)", "at the product's rate, ms", "MFU, published")
    for name in (
        *columns,
        "MFU, product",
        "all operations",
        "peak GiB over weights",
        "first step, s",
        "graphs (breaks)",
    ):
        table.add_column(name, justify="left" if name == "variant" else "right")
    base = results.get(f"{model}/{recompute}/base", {}).get("step_ms")
    for run, result in results.items():
        if not run.startswith(f"{model}/{recompute}/"):
            continue
        variant = run.rpartition("/")[2]
        if "error" in result:
            table.add_row(variant, result["error"])
            continue
        seconds = result["step_ms"] / 1000
        own, everything = result["model_operations"], result["operations_with_recomputation"]
        table.add_row(
            variant,
            f"{result['step_ms']:.4g}",
            f"{result['step_ms'] / base:.3f}" if base else "-",
            f"{own / 1e12:.4g} (+ {(everything - own) / 1e12:.4g})",
            f"{1000 * everything / rate:.4g}",
            f"{own / seconds / peak:.1%}" if peak else "-",
            f"{own / seconds / rate:.1%}",
            f"{everything / seconds / rate:.1%}",
            f"{result['peak_gib']:.3g}",
            f"{result['first_step_s']:.3g}",
            f"{result['graphs']} ({result['graph_breaks']})" if result["graphs"] else "-",
        )
    return table


if __name__ == "__main__":
    main()
