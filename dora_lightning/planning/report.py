"""A plan as tables, as sentences, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from rich.console import Group, RenderableType

from dora_lightning.planning.devices import GIB
from dora_lightning.planning.memory import FSDP2, Memory
from dora_lightning.planning.planner import Outcome, Plan
from dora_lightning.terminal import PlainTable, plain

_PARTS = {
    "base": "base weights",
    "adapters": "adapter parameters",
    "gradients": "gradients",
    "optimizer": "optimiser states",
    "gathered": "gathered weights",
    "norms": "norms",
    "activations": "saved activations",
    "logits": "logits and their gradients",
    "block": "a block's backward pass",
    "reserve": "reserve",
}


def report(plan: Plan) -> RenderableType:
    """Tables of parameters, memory and speed, and what to do."""
    return Group(_parameters(plan), _memory(plan), *_notes(plan), "", plain(advice(plan)))


def advice(plan: Plan) -> str:
    """What to do, in a sentence or two."""
    size, devices = plan.settings.batch_size, _devices(plan.devices)
    best, chosen = plan.best, plan.chosen
    if chosen is not None and chosen.fits:
        text = (
            f"The config fits as it is: {_where(chosen)}, batch size {size} (up to {chosen.largest_batch} would). "
            f"About {chosen.tokens_per_second:,.0f} tokens a second{_time(chosen)}."
        )
        if best is not None and best.tokens_per_second > 1.05 * chosen.tokens_per_second:
            text += f" {_where(best)} fits too and is faster: about {best.tokens_per_second:,.0f}; {_how(best)}."
        return text
    if best is not None:
        return (
            f"It fits by {_where(best)}, batch size {size} (up to {best.largest_batch} would): {_how(best)}. "
            f"About {best.tokens_per_second:,.0f} tokens a second{_time(best)}."
        )
    smaller = max(plan.outcomes, key=lambda outcome: outcome.largest_batch)
    texts = [f"Batch size {size} does not fit on {devices} of {plan.memory / GIB:,.0f} GiB."]
    if smaller.largest_batch:
        texts.append(
            f"Batch size {smaller.largest_batch} does by {_where(smaller)}: {_how(smaller)}, and raise "
            "trainer.accumulate_grad_batches to keep the global batch."
        )
    least = min((count for count in plan.fewest.values() if count is not None), default=None)
    if least is not None and least != plan.devices:
        names = " or ".join(name for name, count in plan.fewest.items() if count == least)
        texts.append(f"The fewest devices that hold it: {least} ({names}).")
    if not smaller.largest_batch and least is None:
        texts.append("No number of devices up to 1,024 holds it: shorten the rows, or quantise the base on one device.")
    return " ".join(texts)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan in plain containers; bytes, tokens a second, hours."""
    step = plan.step
    return {
        "model": plan.model.name,
        "adapter": plan.settings.adapter.to_dict(),
        "devices": plan.devices,
        "device": {
            **asdict(plan.device),
            "name": plan.options.device,
            "tflops": plan.options.peak or plan.device.tflops,
            "memory_bytes": plan.memory,
            "utilization": plan.options.utilization,
        },
        "parameters": {
            "base": plan.weights.base,
            "trainable": plan.weights.trainable,
            "groups": plan.weights.groups,
        },
        "batch": {
            "size": plan.settings.batch_size,
            "rows": step.rows,
            "tokens_per_row": step.length,
            "supervised": step.positions,
            "accumulate": plan.settings.accumulate,
        },
        "samples": plan.settings.samples,
        "operations_per_token": {"plain": plan.operations[0], "checkpointing": plan.operations[1]},
        "outcomes": [
            {
                "strategy": outcome.variant.strategy,
                "checkpointing": outcome.variant.checkpointing,
                "memory": asdict(outcome.memory) | {"total": outcome.memory.total},
                "fits": outcome.fits,
                "largest_batch": outcome.largest_batch,
                "tokens_per_second": outcome.tokens_per_second,
                "communication": outcome.communication,
                "hours": outcome.hours,
                "config": outcome is plan.chosen,
            }
            for outcome in plan.outcomes
        ],
        "fewest_devices": plan.fewest,
        "advice": advice(plan),
    }


def _parameters(plan: Plan) -> PlainTable:
    weights = plan.weights
    share = weights.trainable / (weights.base + sum(_added(plan).values()))
    table = PlainTable(title=f"{plan.model.name}: parameters", show_footer=True)
    table.add_column("part", footer="trains")
    table.add_column("parameters", justify="right", footer=f"{weights.trainable:,} ({share:.2%})")
    table.add_row("base", f"{weights.base:,}", end_section=True)
    for group, count in weights.groups.items():
        table.add_row(group, f"{count:,}")
    return table


def _added(plan: Plan) -> dict[str, int]:
    """Groups that are no part of the base."""
    return {group: count for group, count in plan.weights.groups.items() if group != "other"}


def _memory(plan: Plan) -> PlainTable:
    step, settings = plan.step, plan.settings
    where = "" if plan.devices == 1 else "each of "
    title = f"GiB on {where}{_devices(plan.devices)}: {settings.batch_size} x {step.length:,} tokens"
    table = PlainTable(title=title)
    table.add_column("part")
    for outcome in plan.outcomes:
        table.add_column(
            str(outcome.variant).replace(", ", "\n") + (" *" if outcome is plan.chosen else ""), justify="right"
        )
    rows = [field.name for field in fields(Memory)]
    for name in rows:
        values = [getattr(outcome.memory, name) for outcome in plan.outcomes]
        if any(values):
            table.add_row(_PARTS[name], *map(_gib, values), end_section=name == rows[-1])
    table.add_row("at most at once", *(_gib(o.memory.total) for o in plan.outcomes))
    table.add_row(
        f"fits {plan.memory / GIB:g} GiB",
        *(plain("yes", "green") if o.fits else plain("no", "red") for o in plan.outcomes),
    )
    table.add_row("largest batch", *(f"{o.largest_batch:,}" for o in plan.outcomes), end_section=True)
    table.add_row("tokens/s, all", *(f"{o.tokens_per_second:,.0f}" for o in plan.outcomes))
    if any(outcome.communication > 0.005 for outcome in plan.outcomes):
        table.add_row("of it waiting for weights", *(f"{o.communication:.0%}" for o in plan.outcomes))
    if plan.outcomes[0].hours is not None:
        table.add_row("whole run", *(_span(o.hours) for o in plan.outcomes))
    return table


def _notes(plan: Plan) -> list[str]:
    options, settings = plan.options, plan.settings
    notes = [
        "* as configured",
        "Of logits and a block's backward pass only the larger counts: they are not there together.",
        f"Speed: {plan.operations[0] / 1e9:,.1f} GFLOP a token, {plan.operations[1] / 1e9:,.1f} with checkpointing, "
        f"at {options.utilization:.0%} of {options.peak or plan.device.tflops:g} TFLOPS: assumed, not measured.",
    ]
    if plan.outcomes[0].hours is not None and settings.max_steps <= 0:
        if options.mean_tokens is None:
            notes.append(
                f"The time is an upper bound: each of {settings.samples:,} samples is taken to have "
                f"{plan.step.length:,} tokens; --mean_tokens says how many they have."
            )
    elif settings.max_steps <= 0:
        notes.append("No time of the whole run: --samples (and --mean_tokens for packed rows) would give it.")
    if options.supervised == 1:
        notes.append("Logits: every position is taken to be supervised; --supervised 0.2 says that a fifth is.")
    fewest = ", ".join(f"{count or 'none'} ({name})" for name, count in plan.fewest.items())
    notes.append(f"Fewest devices for this batch size: {fewest}.")
    if settings.quantization is not None:
        notes.append("A quantised base cannot be sharded; dequantising takes time that the speed leaves out.")
    return notes


def _where(outcome: Outcome) -> str:
    variant = outcome.variant
    recomputed = "" if variant.checkpointing else "out"
    strategy = "" if variant.devices == 1 else f"{variant.strategy} on "
    return f"{strategy}{_devices(variant.devices)} with{recomputed} checkpointing"


def _how(outcome: Outcome) -> str:
    variant = outcome.variant
    if variant.strategy == FSDP2:
        recompute = ", activation_checkpointing: true" if variant.checkpointing else ""
        return (
            f"strategy ModelParallelStrategy with data_parallel_size: {variant.devices}, and the callback "
            f"ShardedTraining{recompute}"
        )
    recompute = f"gradient_checkpointing: {str(variant.checkpointing).lower()}"
    return recompute if variant.devices == 1 else f"trainer.strategy: ddp, {recompute}"


def _time(outcome: Outcome) -> str:
    return f", {_span(outcome.hours)} in all" if outcome.hours is not None else ""


def _span(hours: float | None) -> str:
    if hours is None:
        return ""
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def _gib(value: float) -> str:
    return "" if not value else f"{value / GIB:,.2f}"


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count:,} devices"
