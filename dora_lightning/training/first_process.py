"""Work that the first process does alone, for longer than the others may wait in a collective operation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

_POLL_SECONDS = 0.2
# how long the first process waits, after a failure, until the others have read why
_FAREWELL_SECONDS = 10.0
_turns = 0


@contextlib.contextmanager
def first_process_works(what: str) -> Iterator[bool]:
    """Around work of the first process: it yields true there, and the others leave only when that work is done.

    A barrier would end with the process group's timeout, after half an hour by default. Here the others look again and
    again into the store by which the processes found each other. To be entered by all processes, in the same order.

    Args:
        what: name of the work, for the error.

    Raises:
        RuntimeError: on the other processes, if the first one failed or ended; the message says why.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield True
        return
    global _turns
    _turns += 1
    store, key = _get_default_store(), f"dora_lightning/first_process/{_turns}"
    if dist.get_rank() != 0:
        yield False
        _await(store, key, what)
        return
    try:
        yield True
    except BaseException as error:
        store.set(key, f"{type(error).__name__}: {error}")
        _await_readers(store, key)
        raise
    store.set(key, "")


def _await(store: Store, key: str, what: str) -> None:
    try:
        while not store.check([key]):
            time.sleep(_POLL_SECONDS)
        reason = store.get(key).decode()
        store.add(f"{key}/read", 1)
    except (dist.DistError, ConnectionError) as error:
        raise RuntimeError(f"{what}: the first process has ended while this one waited for it") from error
    if reason:
        raise RuntimeError(f"{what} failed on the first process: {reason}")


def _await_readers(store: Store, key: str) -> None:
    """Keep the store, which may be this process's, until the others know."""
    end = time.monotonic() + _FAREWELL_SECONDS
    with contextlib.suppress(dist.DistError, ConnectionError):
        while time.monotonic() < end and store.add(f"{key}/read", 0) < dist.get_world_size() - 1:
            time.sleep(_POLL_SECONDS)
