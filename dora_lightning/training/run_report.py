"""A finished fit as a table in the terminal and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType

from dora_lightning.adapters import AdapterConfig
from dora_lightning.terminal import PlainTable
from dora_lightning.training.run_facts import RunFacts

TITLE = "# Run summary"
"""First line of the page, by which it is known again."""

_METHODS = {"dora": "DoRA", "lora": "LoRA", "vera": "VeRA", "dvora": "DVoRA", "magnitude": "magnitudes", "full": "full"}
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass
class Ending:
    """What a fit has led to.

    Attributes:
        before: held-out scores of the untrained model, by name; empty if it was not evaluated.
        after: scores of the trained one, in validation and, if it was tested, in testing.
        files: what is where.
        commands: what to do next -> what to type.
    """

    before: dict[str, float]
    after: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)

    def lines(self) -> dict[str, str]:
        """Files and commands: too long for a table, and to be copied."""
        return self.files | self.commands


def terminal_report(facts: RunFacts, ending: Ending) -> RenderableType:
    """What was held out before and after, if that is known, and what the run took."""
    table = PlainTable(title="Run summary", show_header=False)
    table.add_column("")
    table.add_column("")
    for name, text in run_rows(facts, ending).items():
        table.add_row(name, text)
    return Group(*([held_out_table(ending.before, ending.after)] if ending.before else []), table)


def held_out_table(before: Mapping[str, float], after: Mapping[str, float]) -> RenderableType:
    """Held-out results: data sets in rows, measures in columns, the loss below."""
    shared = [name.removeprefix("val/") for name in before if name in after]
    measures = list(dict.fromkeys(name.rpartition("/")[2] for name in shared if "/" in name))
    table = PlainTable(title="Held-out results before -> after")
    table.add_column("")
    for measure in measures:
        table.add_column(f"{measure} (%)", justify="right")
    for source in dict.fromkeys(name.rpartition("/")[0] for name in shared if "/" in name):
        if source == "mean":
            table.add_section()
        cells = [(100 * before[f"val/{source}/{m}"], 100 * after[f"val/{source}/{m}"]) for m in measures]
        table.add_row(source, *(f"{old:.1f} -> {new:.1f}" for old, new in cells))
    loss = [f"Held-out loss {before['val/loss']:.3f} -> {after['val/loss']:.3f}"] if "loss" in shared else []
    return Group(*([table] if measures else []), *loss)


def run_rows(facts: RunFacts, ending: Ending) -> dict[str, str]:
    """The table's rows; those that nothing is known of are left out."""
    progress, adapters = facts.progress, facts.adapters
    share = f" ({adapters.share:.2%})" if adapters.total else ""
    rows = {
        "trained": f"{facts.module}, {_adapted(facts)}",
        "parameters": f"{adapters.trainable:,} of {adapters.total:,}{share}",
        "data": _data(facts),
        "time": _time(facts),
        "memory": _memory(facts),
    }
    if facts.losses:
        unit = progress.losses.unit
        several = f" (means of the first and last {progress.losses.window} {unit})"
        means = (
            several if progress.losses.window > 1 else f" (first and last {'batch' if unit == 'batches' else 'step'})"
        )
        rows["training loss"] = f"{facts.losses[0]:.4g} -> {facts.losses[1]:.4g}{means}"
    for name, (value, step) in progress.best.items():
        end = ending.after.get(name)
        last = f"{end:.4g} at the end, " if end is not None else ""
        rows[name] = f"{last}the best" if end == value else f"{last}best {value:.4g} at step {step:,}"
    return {name: text for name, text in rows.items() if text}


def markdown_report(facts: RunFacts, ending: Ending, figures: Sequence[Path], no_matplotlib: bool) -> str:
    """The page: what the terminal shows, and more.

    Args:
        facts: what the run was.
        ending: what came out.
        figures: files in the page's folder.
        no_matplotlib: say what is missing for plots.
    """
    adapters = facts.adapters
    parts = [TITLE, _table(("", ""), list(run_rows(facts, ending).items()))]
    if facts.base:
        parts.insert(1, f"Base model: {_code(facts.base)}")
    counts = [(kind, _METHODS[method], _modules(count)) for kind, (method, count) in adapters.modules.items()]
    if facts.config is not None:
        counts += [(group, "", f"{count:,} parameters") for group, count in adapters.groups.items()]
        parts += ["## What trained", _table(("", "how", "count"), counts)]
    if len(facts.memory) > 1:
        parts += ["## Peak memory", _table(("where", "most"), [(w, size(b)) for w, b in facts.memory.items()])]
    # a batch's training loss and learning rates are no results
    names = [n for n in dict.fromkeys([*ending.before, *ending.after]) if not n.startswith(("train", "lr-"))]
    if names:
        parts += ["## Results", _table(("score", *_RESULTS), [_result(name, facts, ending) for name in names])]
    if figures:
        parts += ["## Plots", *(f"![{figure.stem.replace('_', ' ')}]({figure.name})" for figure in figures)]
    elif no_matplotlib:
        parts += ["Plots need matplotlib: `pip install dora-lightning[plots]`."]
    parts += ["## Files", "\n".join(f"- {label}: {_code(path)}" for label, path in ending.files.items())]
    if ending.commands:
        blocks = [f"{label}:\n\n```bash\n{command}\n```" for label, command in ending.commands.items()]
        parts += ["## What next", *blocks]
    return "\n\n".join(parts) + "\n"


_RESULTS = ("before", "at the end", "best", "at step")


def _result(name: str, facts: RunFacts, ending: Ending) -> tuple[str, ...]:
    best, step = facts.progress.best.get(name, (None, None))
    numbers = [f"{n:.4g}" if n is not None else "" for n in (ending.before.get(name), ending.after.get(name), best)]
    return (name, *numbers, f"{step:,}" if step is not None else "")


def _adapted(facts: RunFacts) -> str:
    """Which method, of what rank, reached which modules."""
    config = facts.config
    if config is None:
        return "no adapters of this library"
    kinds: dict[str, list[str]] = {}
    for kind, (method, _) in facts.adapters.modules.items():
        kinds.setdefault(method, []).append(kind)
    count = sum(number for _, number in facts.adapters.modules.values())
    methods = [f"{_METHODS[method]}{_rank(method, config)} on {', '.join(names)}" for method, names in kinds.items()]
    return f"{'; '.join(methods)} ({_modules(count)})"


def _modules(count: int) -> str:
    return f"{count:,} module{'s' if count != 1 else ''}"


def _rank(method: str, config: AdapterConfig) -> str:
    if method in ("magnitude", "full"):
        return ""
    return f" of rank {config.rank}{' (others by pattern)' if config.rank_pattern else ''}"


def _data(facts: RunFacts) -> str:
    samples = facts.progress.samples
    parts = [f"{facts.steps:,} steps"]
    parts += [f"{facts.epochs:.3g} epochs"] if facts.epochs is not None else []
    parts += [f"{samples:,} samples"] if samples else []
    return ", ".join(parts)


def _time(facts: RunFacts) -> str:
    progress = facts.progress
    steps, seconds = facts.steps - progress.since_step, progress.seconds
    if seconds <= 0:
        return ""
    speed = f"{progress.samples / seconds:.3g} samples/s" if progress.samples else f"{steps / seconds:.3g} steps/s"
    text = f"{duration(seconds)} of training ({speed})"
    text += f", {duration(progress.validating)} of validation" if progress.validating else ""
    text += f", in {progress.parts} parts" if progress.parts > 1 else ""
    return text + (f"; steps up to {progress.since_step:,} were not timed" if progress.since_step else "")


def _memory(facts: RunFacts) -> str:
    most, count = facts.progress.peak_memory, len(facts.memory)
    if not most:
        return ""
    what = "allocated by torch on the GPU" if facts.on_gpu else "main memory of the process"
    return f"{size(most)} at most, {what}" + (f" with the most of {count}" if count > 1 else "")


def duration(seconds: float) -> str:
    """A time as one says it.

    >>> duration(7.25), duration(75), duration(7500)
    ('7.2 s', '1 min 15 s', '2 h 5 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(number: int) -> str:
    """Bytes in the largest unit that they fill.

    >>> size(3 * 2**29), size(200 * 2**20)
    ('1.50 GiB', '200 MiB')
    """
    unit, name = next(((unit, name) for unit, name in _UNITS if number >= unit), (1, "bytes"))
    return f"{number / unit:.2f} {name}" if name == "GiB" else f"{number / unit:.0f} {name}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`"
