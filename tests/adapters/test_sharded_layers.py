"""Two processes with FSDP2 compute what one does, for every kind of layer: outputs, gradients, and after a step."""

from __future__ import annotations

import copy
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dora_lightning.adapters import AdapterConfig, adapter_layers, inject_adapters
from dora_lightning.adapters.norm_cache import NormCache
from dora_lightning.adapters.vera import VeRALinear
from tests.adapters.perturbed import assert_close, perturb
from tests.adapters.zoo import KINDS

CASES: dict[str, dict[str, Any]] = {
    "dora": {},
    "lora": {"method": "lora", "init": "gaussian"},
    "magnitude": {"method": "magnitude", "rank": 16},
    "dvora": {"method": "dvora"},
    "pissa": {"init": "pissa"},
    "full": {"method": "full", "rank": 16},
}


class Zoo(nn.Module):
    """Every kind of layer on its own input."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        kinds = {name: kind for name, kind in KINDS.items() if grouped or kind.groups == 1}
        self.layers = nn.ModuleDict({name.replace(" ", "_"): kind.make() for name, kind in kinds.items()})
        self.inputs = [kind.inputs() for kind in kinds.values()]

    def forward(self) -> Tensor:
        outputs = [layer(x) for layer, x in zip(self.layers.values(), self.inputs, strict=True)]
        return torch.stack([y.square().mean() for y in outputs])


def make(options: dict[str, Any]) -> Zoo:
    torch.manual_seed(0)
    model = Zoo(grouped=options.get("method") != "dvora" and "init" not in options)
    names = [f"layers.{name}" for name in model.layers]
    inject_adapters(model, AdapterConfig(**({"rank": 4, "target_modules": names} | options)))
    perturb(model)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model: nn.Module) -> dict[str, Tensor]:
    """Two steps; outputs and gradients of each."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    found = {}
    for step in range(2):
        optimizer.zero_grad()
        y = model()
        y.sum().backward()
        found[f"{step} outputs"] = y.detach()
        found |= {f"{step} {name}": whole(p.grad) for name, p in trained.items() if p.grad is not None}
        optimizer.step()
    return found


def swap_and_load(model: nn.Module) -> list[Tensor]:
    """Outputs in training, of other weights in evaluation, in training again, and after loading others still."""
    # as on a GPU, where contents are not compared
    NormCache._unchanged = lambda self, small: True  # type: ignore[method-assign]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: p.detach().clone() for name, p in trained.items()}
    found = [model().detach()]
    model.eval()
    for p in trained.values():
        p.data.mul_(1.5)
    with torch.no_grad():
        found.append(model())
    for name, p in trained.items():
        p.data.copy_(kept[name])
    model.train()
    found.append(model().detach())
    model.load_state_dict({name: value * 0.5 for name, value in kept.items()}, strict=False)
    found.append(model().detach())
    return found


def compare(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model, sharded = make({}), make({})
    fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
    outputs = swap_and_load(model)
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3)
    assert torch.equal(outputs[0], outputs[2])
    for found, expected in zip(swap_and_load(sharded), outputs, strict=True):
        assert_close(found, expected, 1e-5)
    for options in CASES.values():
        expected = train(make(options))
        model = make(options)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        found = train(model)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, 1e-4)
        pairs = {id(layer.pair) for _, layer in adapter_layers(model) if isinstance(layer, VeRALinear)}
        assert len(pairs) <= 1
    dist.destroy_process_group()


def test_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(compare, (port,), nprocs=2)


@pytest.mark.parametrize("name", CASES)
def test_a_copy_trains_alike(name: str) -> None:
    model = make(CASES[name])
    model()
    other = copy.deepcopy(model)
    assert all(
        torch.equal(value, other_value)
        for value, other_value in zip(train(model).values(), train(other).values(), strict=True)
    )
