"""Real training steps of a tiny DoRALlama, measured, and the same steps planned.

The library is imported inside the functions: jaxtyping's import hook is set after this file is read.
"""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Case:
    """A step: an adapter, a batch, and how it is computed."""

    folder: Path
    adapter: dict[str, Any]
    dtype: str = "float32"
    rows: int = 2
    length: int = 64
    supervised: int = 32
    padding: int = 0
    checkpointing: bool = False
    autocast: bool = False
    attention: str | None = None
    quantization: str | None = None

    def backbone(self) -> Any:
        from dora_lightning import AdapterConfig
        from dora_lightning.backbones import DoRALlama

        torch.manual_seed(0)
        backbone = DoRALlama(
            str(self.folder),
            AdapterConfig(**self.adapter),
            dtype=self.dtype,
            gradient_checkpointing=self.checkpointing,
            attn_implementation=self.attention,
            quantization=self.quantization,
        )
        backbone.configure_model()
        return backbone.train()

    def batch(self) -> dict[str, Tensor]:
        ids = torch.randint(3, 380, (self.rows, self.length))
        labels = ids.clone()
        labels[:, : self.length - self.supervised] = -100
        mask = torch.ones_like(ids)
        if self.padding:
            labels[0, -self.padding :] = -100
            mask[0, -self.padding :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def planned(self) -> Any:
        from dora_lightning import AdapterConfig
        from dora_lightning.planning.models import planned_model

        return planned_model(str(self.folder), AdapterConfig(**self.adapter), self.dtype)

    def step(self) -> Any:
        from dora_lightning.planning.activations import Step

        width = 4 if self.dtype == "float32" else 2
        positions = self.rows * self.supervised - self.padding
        return Step(
            rows=self.rows,
            length=self.length,
            supervised=positions / (self.rows * (self.length - 1)),
            compute_bytes=2 if self.autocast else width,
            stream_bytes=width,
            attention=self.attention or "sdpa",
            masked=self.padding > 0,
            quantized=self.quantization is not None,
            checkpointing=self.checkpointing,
            on_cpu=True,
        )

    def forward(self, backbone: Any, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return backbone.loss(batch)[0]


def saved_bytes(case: Case) -> int:
    """Bytes of what autograd keeps of a forward pass, each storage once, without parameters."""
    backbone, batch = case.backbone(), case.batch()
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.forward(backbone, batch)
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(case: Case) -> int:
    """The most bytes that a step takes at once beside parameters and gradients."""
    backbone, batch = case.backbone(), case.batch()
    case.forward(backbone, batch).backward()  # norms are cached, and gradients are there
    parameters = list(backbone.parameters())
    live = LiveBytes([*parameters, *backbone.buffers(), *(p.grad for p in parameters if p.grad is not None)])
    with live:
        case.forward(backbone, batch).backward()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that is made, until it is freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        if storage in self.seen or storage.data_ptr() in self.known:
            return
        self.seen[storage] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
