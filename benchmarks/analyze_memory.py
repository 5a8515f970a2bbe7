"""Memory of ``dora-lightning analyze`` on two model folders, against the largest tensor in them.

    python benchmarks/analyze_memory.py [--layers 16] [--vocab 128256] [--hidden 2048] [--folder FOLDER] [--json FILE]

Makes a LLaMA's folder of random bf16 weights (by default of the shape of LLaMA-3.2-1B, tied embeddings, 2.5 GB), in
shards as on the hub, and a second one that is tuned a little; nothing of either is ever whole in memory. A process of
its own runs the verb on a tiny pair first, so that everything is imported, and then on the large one. ``peak`` is the
most resident memory beyond what the process had before the second run, pages of mapped files included. The numbers are
compared with the paper's formulas in float64, computed here row by row. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig

from dora_lightning.analyzing.stored_weights import write_tensors

SHARD_BYTES = 2**29
MIB = 2**20
ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--folder", help="where to make the models; by default a temporary folder that is removed")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--run", nargs=2, metavar=("TINY", "LARGE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(*map(Path, options.run))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        tiny, large = Path(temporary) / "tiny", Path(temporary) / "large"
        make_pair(tiny, layers=2, vocab=64, hidden=32)
        make_pair(large, options.layers, options.vocab, options.hidden)
        command = [sys.executable, __file__, "--run", str(tiny), str(large)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        result |= compare(large)
    shown = {key: value for key, value in vars(options).items() if key in ("layers", "vocab", "hidden")}
    print(shown)
    print(
        f"folder {result['folder_mib']:.0f} MiB, largest tensor {result['largest_mib']:.0f} MiB, peak "
        f"{result['peak_mib']:.0f} MiB ({result['peak_mib'] / result['largest_mib']:.2f} largest tensors) over "
        f"{result['baseline_mib']:.0f} MiB, {result['seconds']:.1f} s"
    )
    print(f"{result['modules']} modules, largest relative difference from float64 {result['difference']:.1e}")
    if options.json:
        Path(options.json).write_text(json.dumps({"setting": shown} | result, indent=2) + "\n")


def make_pair(folder: Path, layers: int, vocab: int, hidden: int) -> None:
    """``base`` and ``tuned`` inside ``folder``."""
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    kv = hidden // heads * config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {f"{attention}.{name}.weight": (hidden, hidden) for name in ("q_proj", "o_proj")}
        shapes |= {f"{attention}.{name}.weight": (kv, hidden) for name in ("k_proj", "v_proj")}
        shapes |= {f"{mlp}.{name}.weight": (4 * hidden, hidden) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{mlp}.down_proj.weight": (hidden, 4 * hidden)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{layer}.{name}.weight": (hidden,) for name in norms}
    for name in ("base", "tuned"):
        config.save_pretrained(folder / name)
        shards = list(_shards(shapes))
        weight_map = {}
        for number, keys in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(keys, file)
            with open(folder / name / file, "wb") as writer:
                wanted = [(key, shapes[key], torch.bfloat16) for key in keys]
                write_tensors(writer, wanted, (_random(key, shapes[key], name == "tuned") for key in keys))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(tiny: Path, large: Path) -> dict[str, float]:
    """In this process: peak memory of the verb beyond what was there before it."""
    from dora_lightning.analyzing.command import analyze

    torch.set_num_threads(1)
    for folder in (tiny, large):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before, started = _status("VmRSS"), time.perf_counter()
        analyze(str(folder / "tuned"), base=str(folder / "base"), output=str(folder / "analysis"))
    seconds = time.perf_counter() - started
    return {"baseline_mib": before / MIB, "peak_mib": (_status("VmHWM") - before) / MIB, "seconds": seconds}


def compare(large: Path) -> dict[str, float]:
    """What the verb wrote against float64, by the formulas."""
    records = json.loads((large / "analysis" / "analysis.json").read_text())["records"]
    index = json.loads((large / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    difference = largest = 0.0
    for record in records:
        key = f"{record['module']}.weight"
        with (
            safe_open(large / "base" / index[key], framework="pt") as base,
            safe_open(large / "tuned" / index[key], framework="pt") as tuned,
        ):
            old, new = base.get_tensor(key), tuned.get_tensor(key)
        largest = max(largest, old.numel() * old.itemsize)
        if "embed_tokens" in key:
            old, new = old.T, new.T
        moved, turned = 0.0, 0.0
        for rows in range(0, len(old), ROWS):
            w, v = old[rows : rows + ROWS].double(), new[rows : rows + ROWS].double()
            moved += float((v.norm(dim=1) - w.norm(dim=1)).abs().sum())
            units = [torch.nn.functional.normalize(matrix, dim=1) for matrix in (w, v)]
            turned += float((units[1] - units[0]).square().sum() / 2)
        for name, value in (("delta_m", moved / len(old)), ("delta_d", turned / len(old))):
            difference = max(difference, abs(record[name] - value) / value)
    size = sum(file.stat().st_size for file in (large / "base").glob("*.safetensors"))
    found = {"folder_mib": size / MIB, "largest_mib": largest / MIB}
    return found | {"modules": len(records), "difference": difference}


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key, shape in shapes.items():
        needed = 2 * torch.Size(shape).numel()
        if keys and size + needed > SHARD_BYTES:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += needed
    yield keys


def _random(key: str, shape: tuple[int, ...], tuned: bool) -> torch.Tensor:
    """A weight that its name determines; of the tuned model, with a little noise on it."""
    generator = torch.Generator().manual_seed(sum(key.encode()) + 1000 * len(key))
    weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    if tuned and len(shape) > 1:
        weight += torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.002, generator=generator)
    return weight


def _status(name: str) -> int:
    """Bytes that the kernel counts for this process: in memory now (VmRSS), or at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
