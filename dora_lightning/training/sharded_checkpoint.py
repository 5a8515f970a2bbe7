"""Checkpoints of a sharded run that hold the adapter alone, in the very format of a run on one device.

Lightning's ``ModelParallelStrategy`` gathers the whole base before a filter can act, numbers optimiser states by the
position of a parameter in the model where every other strategy numbers them by optimiser group, and cannot resume a
checkpoint that lacks the base. Here what trains is gathered, and nothing else; a file that one process wrote is resumed
by many, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from dora_lightning.adapters import forget_norms
from dora_lightning.training.adapter_checkpoint import frozen_names


def use_adapter_checkpoints(strategy: ModelParallelStrategy) -> None:
    """Let ``strategy`` save and restore what trains, whole, on the first process."""
    object.__setattr__(strategy, "lightning_module_state_dict", partial(_module_state, strategy))
    object.__setattr__(strategy, "optimizer_state", _optimizer_state)
    object.__setattr__(strategy, "load_checkpoint", partial(ParallelStrategy.load_checkpoint, strategy))
    object.__setattr__(strategy, "load_model_state_dict", partial(_load_states, strategy))


def _module_state(strategy: ModelParallelStrategy) -> dict[str, Tensor]:
    module = strategy.lightning_module
    assert module is not None
    frozen = frozen_names(module)
    return {name: whole_tensor(t) for name, t in module.state_dict().items() if name not in frozen}


def _optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    return tree_map(whole_tensor, optimizer.state_dict())


def _load_states(strategy: ModelParallelStrategy, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
    """Restore the module, and the optimisers too: Lightning leaves both to the strategy here."""
    assert strategy.lightning_module is not None
    present = strategy.lightning_module.state_dict()
    with torch.no_grad():
        for name, tensor in checkpoint["state_dict"].items():
            present[name].copy_(_sharded_like(tensor, present[name]))
    read_shards_anew(strategy.lightning_module)
    for optimizer, state in zip(strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sharded = {
            index: {key: _sharded_like(value, parameters[index]) for key, value in values.items()}
            for index, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": sharded})


def read_shards_anew(module: nn.Module) -> None:
    """Have the next forward pass see what the shards hold now.

    After a forward pass without gradients FSDP2 keeps the weights of the root unit gathered, and norms are cached of
    what is gathered: neither notices that a checkpoint was loaded, or an average swapped, into the shards.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
    forget_norms(module)


def whole_tensor(value: Any) -> Any:
    """A sharded tensor gathered on every process, on the CPU; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()


def _sharded_like(value: Any, reference: Tensor) -> Any:
    if not isinstance(reference, DTensor) or not isinstance(value, Tensor) or value.shape != reference.shape:
        return value  # a count of steps, or an unsharded tensor
    value = value.to(reference.device)
    # every process has read the same file, so nothing need be sent
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
