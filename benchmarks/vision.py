"""Training throughput of a LLaVA: batches grouped by length against unsorted ones, cached vision features against none.

    python benchmarks/vision.py

A CLIP ViT-B/16-sized tower and a small LLaMA, random weights, read conversations of mixed length about images and about
none, on the CPU. Each variant sees the same samples; variants take turns, and every round's ratio is of one moment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from datamodules import LlavaInstructions
from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlava
from dora_lightning.llava_parts import LlavaParts

WORDS = [f"word{number}" for number in range(500)]
SIDE, PATCH = 224, 32


def save_language_model(folder: Path) -> None:
    """A random LLaMA of four layers and a tokenizer of whole words."""
    vocabulary = {
        token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *WORDS, "USER", ":", "ASSISTANT"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_conversations(folder: Path, rows: int, seed: int) -> None:
    """Conversations of very different lengths: two thirds with short answers, a third with long ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    conversations = []
    for number in range(rows):
        turns: list[dict[str, str]] = []
        for turn in range(draw(1, 6)):
            longest = 12 if number % 3 else 90
            image = "<image>\n" if turn == 0 and number % 10 else ""
            for speaker, length in (("human", draw(4, 16)), ("gpt", draw(1, longest))):
                words = " ".join(WORDS[draw(0, len(WORDS))] for _ in range(length))
                turns.append({"from": speaker, "value": (image if speaker == "human" else "") + words})
        row: dict[str, Any] = {"id": str(number), "conversations": turns}
        if number % 10:  # one in ten is of text alone
            pixels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
        conversations.append(row)
    (folder / "train.json").write_text(json.dumps(conversations))


def epoch(module: DoRALlava, batches: list[dict[str, Any]]) -> float:
    """Seconds of forward and backward passes over the batches."""
    start = time.perf_counter()
    for batch in batches:
        module.loss(batch)[0].backward()
        module.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def compare(rounds: int, **variants: Callable[[], float]) -> dict[str, Any]:
    """Seconds of each variant, interleaved, and the ratio of the second to the first by round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(run())
    first, second = variants
    ratios = [b / a for a, b in zip(seconds[first], seconds[second], strict=True)]
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96, help="conversations")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tower = {"image_size": SIDE, "patch_size": PATCH, "hidden_size": 768, "intermediate_size": 3072}
    tower |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["DORA_LIGHTNING_CACHE"] = str(folder / "cache")
        save_language_model(folder / "language")
        save_conversations(folder, options.rows, seed=0)
        parts = LlavaParts(str(folder / "language"), tower)

        def module(**choices: Any) -> DoRALlava:
            backbone = DoRALlava(parts, AdapterConfig(rank=16), **choices)
            backbone.configure_model()
            return backbone

        def batches(group_by_length: bool) -> list[dict[str, Any]]:
            data = LlavaInstructions(
                parts, str(folder / "train.json"), batch_size=options.batch_size, num_workers=0,
                group_by_length=group_by_length,
            )  # fmt: skip
            data.setup("fit")
            return list(data.train_dataloader())

        grouped, unsorted = batches(True), batches(False)
        plain, cached = module(), module(feature_cache=str(folder / "features"))
        epoch(cached, grouped)  # fills the cache; not timed
        tokens = {
            name: (sum(b["input_ids"].numel() for b in some), sum(int(b["attention_mask"].sum()) for b in some))
            for name, some in (("grouped", grouped), ("unsorted", unsorted))
        }
        results = {
            "unsorted / grouped by length": compare(
                options.rounds, grouped=lambda: epoch(cached, grouped), unsorted=lambda: epoch(cached, unsorted)
            ),
            "no cache / cached features": compare(
                options.rounds, cached=lambda: epoch(cached, grouped), computed=lambda: epoch(plain, grouped)
            ),
        }
    for name, (width, real) in tokens.items():
        print(f"{name}: {width:,} tokens in batches, {100 * (1 - real / width):.1f} % of them padding")
    for name, result in results.items():
        low, high = result["ratio_min"], result["ratio_max"]
        print(f"{name}: {result['ratio']:.2f} ({low:.2f} to {high:.2f})  seconds {result['seconds']}")
    if options.output:
        options.output.write_text(json.dumps({"options": vars(options), "results": results}, indent=2, default=str))


if __name__ == "__main__":
    main()
