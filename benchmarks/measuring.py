"""Peak memory of a step, and variants that take turns, each in a process of its own: what several benchmarks share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most that one step has allocated at once, over what was allocated before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    allocations = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def run_in_turns(variants: Sequence[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Results of each variant: the running script is called with its own arguments and ``--variant``, again and again.

    The order rotates, so that a slow moment of the machine hits all of them alike. The last line that a process prints
    is its result, as JSON; if one fails, its error is the script's.
    """
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for repeat in range(repeats):
        turn = repeat % len(variants)
        for variant in (*variants[turn:], *variants[:turn]):
            command = [sys.executable, *sys.argv, "--variant", variant]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
    return runs
