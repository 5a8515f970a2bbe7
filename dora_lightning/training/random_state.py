"""Random states in checkpoints, so that a resumed run drops what the uninterrupted one would have dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def gather_random_states() -> list[dict[str, Tensor]]:
    """torch's random states of every process, in order of rank; to be called on every process."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        own["cuda"] = torch.cuda.get_rng_state()
    if not distributed.is_initialized():
        return [own]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, own)
    return states


def restore_random_states(states: list[dict[str, Tensor]]) -> None:
    """Put back this process's states; nothing happens if there were more or fewer processes then."""
    rank, count = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    if len(states) != count:
        return
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())
