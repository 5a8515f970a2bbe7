"""Mixed precision, sharding and activation checkpointing for a frozen base with adapters."""

from __future__ import annotations

from collections import Counter
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from dora_lightning.adapters import DoRALinear, MagnitudeLinear, adapter_layers
from dora_lightning.adapters.quantized import is_quantized
from dora_lightning.training.adapter_run import run_of
from dora_lightning.training.build_steps import BuildStep, after_model_is_built
from dora_lightning.training.sharded_checkpoint import read_shards_anew, use_adapter_checkpoints
from dora_lightning.training.streaming import allocate, awaits_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CACHES = {"past_key_values", "past_key_value", "layer_past", "cache", "use_cache"}
_RECOMPUTED = "dora_lightning_recomputed"
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")

_ALTERNATIVE = (
    "use FSDP2: strategy: {class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: "
    "{data_parallel_size: <processes>, tensor_parallel_size: 1, save_distributed_checkpoint: false}}"
)


class ShardedTraining(Callback):
    """Prepares a model with adapters for the strategy at hand; the module itself does not know how it is sharded.

    Under ``ModelParallelStrategy`` each transformer block, then the whole, becomes an FSDP2 unit (frozen base and
    adapters together; FSDP2 shards tensors of several dtypes in one unit), and checkpoints gather what trains and never
    the base. On a single device and under DDP the same precision and activation checkpointing apply. A model that was
    built on the meta device is given its weights here, each process reading its own rows of the base's files.

    Args:
        base_dtype: dtype that frozen floating-point weights are cast to; null leaves them as they are. What trains
            stays fp32.
        blocks: class names of the transformer blocks; by default what the transformers model declares
            (``_no_split_modules``), else the class that repeats most often in a ``ModuleList``.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        reshard_after_forward: free each block's gathered weights after its forward pass; False trades memory for speed.

    Raises:
        ValueError: unknown dtype, no such blocks, or a strategy that cannot do it, with the alternative.
    """

    fills_meta_parameters = True

    def __init__(
        self,
        base_dtype: str | None = "bfloat16",
        blocks: list[str] | None = None,
        activation_checkpointing: bool = False,
        reshard_after_forward: bool = True,
    ) -> None:
        if base_dtype is not None and base_dtype not in DTYPES:
            raise ValueError(f"base_dtype must be null or one of {', '.join(DTYPES)}, got {base_dtype!r}")
        self.base_dtype = None if base_dtype is None else DTYPES[base_dtype]
        self.blocks = blocks
        self.activation_checkpointing = activation_checkpointing
        self.reshard_after_forward = reshard_after_forward

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy and have the model prepared after adapters are injected."""
        _check_strategy(trainer)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            use_adapter_checkpoints(trainer.strategy)
        after_model_is_built(self, trainer, pl_module, BuildStep.SHARD, lambda module: self._prepare(trainer, module))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See weights that were swapped since training, as by an average of them."""
        read_shards_anew(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See weights that were swapped back."""
        read_shards_anew(pl_module)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(isinstance(module, FSDPModule) for module in pl_module.modules()):
            return  # a second call of configure_model, or a later stage
        if self.base_dtype is not None:
            # a magnitude that starts as the norm of the base must do so of the base as it is computed with
            fresh = [layer for layer in _with_magnitude(pl_module) if _starts_at_norm(layer)]
            cast_frozen(pl_module, self.base_dtype)
            for layer in fresh:
                layer.reset_magnitude()
        strategy = trainer.strategy
        sharded = isinstance(strategy, ModelParallelStrategy)
        if sharded and any(is_quantized(module) for module in pl_module.modules()):
            raise ValueError(
                "a quantised base cannot be sharded: FSDP2 puts plain parameters in the place of bitsandbytes' "
                "weights, which lose their scales, and cannot split torchao's; set strategy: ddp, where each process "
                "holds the packed base (a quarter to a half of bf16's), or leave the base unquantised"
            )
        wanted = sharded or self.activation_checkpointing or self.blocks is not None
        blocks = find_blocks(pl_module, self.blocks) if wanted else []
        if self.activation_checkpointing:
            for block in blocks:
                checkpoint_activations(block)
        if isinstance(strategy, ModelParallelStrategy):
            mesh = strategy.device_mesh["data_parallel"]
            for block in blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
            # what is outside of the blocks stays gathered from the forward to the backward pass
            fully_shard(pl_module, mesh=mesh, reshard_after_forward=False)
            for step in _STEPS:
                _call_through_module(pl_module, step)
            rank_zero_info(f"FSDP2: {len(blocks)} blocks over {mesh.size()} processes")
        if awaits_weights(pl_module):
            try:
                run_of(pl_module).stream_base(pl_module, strategy.root_device)
            except Exception:
                # Lightning moves the module when it stops, and an error of torch's would hide this one
                allocate(pl_module, strategy.root_device)
                raise


def _with_magnitude(module: nn.Module) -> list[DoRALinear | MagnitudeLinear]:
    return [layer for _, layer in adapter_layers(module) if isinstance(layer, (DoRALinear, MagnitudeLinear))]


def _starts_at_norm(layer: DoRALinear | MagnitudeLinear) -> bool:
    return not layer.magnitude.is_meta and torch.equal(layer.magnitude, layer.norm())


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen floating-point parameters; what trains, and buffers (rotary frequencies), keep theirs."""
    for parameter in module.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def find_blocks(module: nn.Module, names: list[str] | None = None) -> list[nn.Module]:
    """The transformer blocks inside ``module``, by class name, or as the model declares them.

    Raises:
        ValueError: none are found, or none of one of the names; the message lists what repeats.
    """
    declared = {name for child in module.modules() for name in (getattr(child, "_no_split_modules", None) or ())}
    wanted = set(names) if names is not None else declared
    blocks = [child for child in module.modules() if type(child).__name__ in wanted]
    repeated = Counter(
        type(child).__name__
        for parent in module.modules()
        if isinstance(parent, nn.ModuleList)
        for child in parent
        if any(True for _ in child.parameters())
    )
    if not blocks and names is None and repeated:
        commonest = repeated.most_common(1)[0][0]
        blocks = [child for child in module.modules() if type(child).__name__ == commonest]
    absent = set(names or ()) - {type(block).__name__ for block in blocks}
    if not blocks or absent:
        listing = ", ".join(repeated) or "nothing in a ModuleList"
        which = f"{min(absent)!r} of " if blocks else ""
        raise ValueError(
            f"no transformer blocks found ({which}blocks={names}); name their class. What repeats: {listing}"
        )
    return blocks


def checkpoint_activations(block: nn.Module) -> None:
    """Recompute ``block`` in the backward pass; parameter names stay as they are. A second call changes nothing."""
    forward = block.forward
    if hasattr(forward, _RECOMPUTED):
        return

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # run a second time, the block would append to a cache of keys and values once more
        kwargs |= {name: False if name == "use_cache" else None for name in _CACHES & kwargs.keys()}
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    setattr(recomputed, _RECOMPUTED, True)
    object.__setattr__(block, "forward", recomputed)


def _call_through_module(pl_module: LightningModule, name: str) -> None:
    """Let a step run inside ``pl_module.__call__``, where FSDP2's hooks gather the root's weights.

    A step may then use any part of the model in any way, as it does without sharding.
    """
    method = getattr(pl_module, name)

    @wraps(method)
    def step(*args: Any, **kwargs: Any) -> Any:
        original = pl_module.forward

        def forward(*inner_args: Any, **inner_kwargs: Any) -> Any:
            object.__setattr__(pl_module, "forward", original)
            return method(*inner_args, **inner_kwargs)

        object.__setattr__(pl_module, "forward", forward)
        return pl_module(*args, **kwargs)

    object.__setattr__(pl_module, name, step)


def _check_strategy(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "ShardedTraining does not run under FSDPStrategy (FSDP1), which cannot hold a bf16 base and fp32 adapters "
            f"in one unit, nor clip gradients by norm; {_ALTERNATIVE}"
        )
    if type(strategy).__name__ == "DeepSpeedStrategy":
        raise ValueError(f"ShardedTraining does not run under DeepSpeed; {_ALTERNATIVE}")
    if isinstance(strategy, ModelParallelStrategy):
        if strategy._save_distributed_checkpoint:
            raise ValueError(
                "Lightning cannot resume a sharded checkpoint that holds the adapter alone; "
                "set save_distributed_checkpoint: false (adapters are small)"
            )
        if strategy._tensor_parallel_size != 1:
            raise ValueError("adapters are not tensor-parallel; set tensor_parallel_size: 1")
