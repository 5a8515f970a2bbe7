"""Gathering and scattering of what trains, on a mesh of one process; two processes are in test_sharded_training.py."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dora_lightning.training.sharded_checkpoint import use_adapter_checkpoints, whole_tensor


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def made(seed: int, mesh: DeviceMesh) -> tuple[nn.Module, ModelParallelStrategy]:
    """A module of a frozen and a trained layer with a buffer, sharded, and a strategy whose optimiser has stepped."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    module[0].requires_grad_(False)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    strategy._lightning_module = module
    strategy.optimizers = [optimizer]
    use_adapter_checkpoints(strategy)
    return module, strategy


def test_what_trains_and_buffers_are_gathered_whole(mesh: DeviceMesh) -> None:
    module, strategy = made(0, mesh)
    assert isinstance(module[0].weight, DTensor)
    state = strategy.lightning_module_state_dict()
    assert state.keys() == module.state_dict().keys() - {"0.weight", "0.bias"}
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in state.values())
    assert torch.equal(state["2.weight"], module[2].weight.full_tensor())
    moments = strategy.optimizer_state(strategy.optimizers[0])["state"]
    assert all(type(value) is torch.Tensor for entry in moments.values() for value in entry.values())


def test_what_was_gathered_is_restored_into_the_shards(mesh: DeviceMesh, tmp_path: Path) -> None:
    module, strategy = made(0, mesh)
    checkpoint = {
        "state_dict": strategy.lightning_module_state_dict(),
        "optimizer_states": [strategy.optimizer_state(strategy.optimizers[0])],
    }
    torch.save(checkpoint, tmp_path / "file.ckpt")
    read = torch.load(tmp_path / "file.ckpt", weights_only=True)
    other, other_strategy = made(1, mesh)
    frozen = other[0].weight.full_tensor().clone()
    other_strategy.load_model_state_dict(read)
    assert torch.equal(other[0].weight.full_tensor(), frozen)
    for index in (1, 2):
        assert torch.equal(whole_tensor(other[index].weight), whole_tensor(module[index].weight))
    assert torch.equal(other[1].running_mean, module[1].running_mean)
    ours, theirs = (s.optimizer_state(s.optimizers[0]) for s in (other_strategy, strategy))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    (optimizer,) = other_strategy.optimizers
    assert all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values())
    # and it goes on from there
    other(torch.randn(4, 3)).sum().backward()
    optimizer.step()


def test_anything_else_passes_through() -> None:
    value: Any = SimpleNamespace()
    assert whole_tensor(value) is value
    assert whole_tensor(3) == 3
    gathered = whole_tensor(torch.ones(2, requires_grad=True))
    assert not gathered.requires_grad
