"""Caches a weight norm, and computes it anew when anything that it was computed from may have changed.

The norm of ``W + s B A`` changes once per optimizer step, but a forward pass happens for every micro-batch, every
recomputation of a checkpointed block and every generated token. A stale norm would be silent and wrong. Watched are:

- every tensor's identity, memory, dtype and version counter, which in-place operations and ``load_state_dict`` move;
- the number of optimizer steps in this process, since optimizers may write through ``.data`` or a kernel of their own,
  which moves no version counter;
- whether gradients are recorded, and each call of ``train()`` and ``eval()``
  (:class:`~dora_lightning.adapters.layers.AdapterLayer` clears its caches then): weight averaging swaps weights through
  ``.data`` between training and evaluation;
- on a CPU, the contents of the small tensors. On other devices a comparison would have to wait for the device: without
  gradients the norm is computed at every call there, unless :func:`weights_kept` promises that nothing changes.

What is left is a write through ``.data`` on such a device, between two training forward passes that have neither an
optimizer step nor an evaluation between them (in the middle of gradient accumulation), and one to a frozen base without
a change of mode. :func:`~dora_lightning.adapters.layers.forget_norms` is for those.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# torch calls this after each step of any optimiser
register_optimizer_step_post_hook(_count_step)


_promise: ContextVar[object | None] = ContextVar("promise", default=None)


@contextmanager
def weights_kept() -> Iterator[None]:
    """Promise that nothing a norm depends on changes within: each is looked at once, and then taken as it is.

    For generation, which calls a layer for every token: looking at a norm costs as much as a small layer on a CPU, and
    on a GPU each look computes it.
    """
    token = _promise.set(_promise.get() or object())
    try:
        yield
    finally:
        _promise.reset(token)


class NormCache:
    """Holds one tensor and the state of the tensors it was computed from."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._copies: list[Tensor] = []
        self._value: Tensor | None = None
        self._promise: object | None = None

    def get(self, compute: Callable[[], Tensor], large: list[Tensor], small: list[Tensor]) -> Tensor:
        """The value of ``compute()``, kept as long as the tensors it reads are the same.

        Args:
            compute: called without gradients.
            large: tensors that are only watched (base weights, frozen).
            small: tensors that are also compared by content on a CPU (the adapter's own).
        """
        if torch.compiler.is_compiling():
            # what is watched (identity, memory, versions) is not in a graph: it computes the norm whenever it runs
            with torch.no_grad():
                return compute()
        promise = _promise.get()
        if promise is not None and promise is self._promise and self._value is not None:
            return self._value
        tensors = [*large, *small]
        trains = any(tensor.requires_grad for tensor in tensors)
        moment = (_optimizer_steps, torch.is_grad_enabled()) if trains else None
        key = (moment, *(_state(tensor) for tensor in tensors))
        if self._value is not None and key == self._key and self._unchanged(small):
            self._promise = promise
            return self._value
        # never an inference tensor: what validation computes, training must be able to use
        with torch.inference_mode(False), torch.no_grad():
            self._value = compute()
            self._copies = [tensor.detach().clone() for tensor in small if tensor.device.type == "cpu"]
        self._key, self._promise = key, promise
        return self._value

    def clear(self) -> None:
        """Forget the value."""
        self._key, self._copies, self._value, self._promise = None, [], None, None

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        """A copy, by ``copy`` or ``pickle``, starts empty: its tensors are others."""
        return NormCache, ()

    def _unchanged(self, small: list[Tensor]) -> bool:
        """Whether the small tensors hold what they held; what cannot be compared is trusted in training alone."""
        on_cpu = [tensor for tensor in small if tensor.device.type == "cpu"]
        if len(on_cpu) < len(small) and not torch.is_grad_enabled():
            return False
        return len(on_cpu) == len(self._copies) and all(
            torch.equal(tensor.detach(), copy) for tensor, copy in zip(on_cpu, self._copies, strict=True)
        )


class _Identity(weakref.ref):
    """Equal to that of the same object while it lives; a plain reference would compare tensors by value."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self() is not None and self() is other()

    __hash__ = weakref.ref.__hash__


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = -1 if tensor.is_inference() else tensor._version
    pointer = 0 if tensor.is_meta else tensor.data_ptr()
    # a weak reference, since id and memory of a freed tensor may be given to the next one
    return (_Identity(tensor), pointer, version, tensor.dtype, tensor.device)
