"""Two processes, DDP and FSDP2, follow one process; their checkpoints hold the adapter and are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from plain_modules import Plain, make_loader, values
from sharded_run import STEPS, STOP, fit
from tiny import MakeBackbone, MakeData, MakeTrainer, save_llama
from torch import nn
from transformers import AutoModelForCausalLM

from dora_lightning.adapters import adapter_layers
from dora_lightning.callbacks import DoRA, ShardedTraining
from dora_lightning.callbacks.sharded_training import cast_frozen, checkpoint_activations, find_blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")


class Runs:
    """Results of the same training by one process and by two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.llama = str(save_llama(folder / "llama"))
        self.one = fit("single", self.llama, folder, "single", merge=True)
        root = Path(__file__).parents[2]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*launch, str(Path(__file__).with_name("sharded_run.py")), self.llama, str(folder)],
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        self.ranks: list[dict[str, Any]] = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)]

    def adapters(self, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / f"{name}-rank{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sharded"))


# Two processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_trajectory_is_that_of_one_process(runs: Runs, kind: str) -> None:
    expected = runs.one["losses"]
    assert len(expected) == 2 * STEPS
    assert expected[-1] < expected[0] - 1  # it learns, so that a wrong gradient would show
    for rank in runs.ranks:
        assert rank[kind]["losses"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "two-two", "one-two"])
def test_processes_hold_the_same_adapters_at_the_end(runs: Runs, name: str) -> None:
    first, second, single = runs.adapters(name, 0), runs.adapters(name, 1), runs.adapters("single")
    assert first.keys() == second.keys() == single.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        torch.testing.assert_close(value, single[key], rtol=0, atol=2e-5)


def test_every_parameter_is_sharded(runs: Runs) -> None:
    for rank in runs.ranks:
        assert rank["ddp"]["sharded"] == 0
        assert rank["fsdp2"]["sharded"] > 20
        assert rank["fsdp2"]["local"] <= 0.51 * rank["fsdp2"]["total"]


@pytest.mark.parametrize("name", ["fsdp2 from fsdp2", "fsdp2 from single", "ddp from fsdp2"])
def test_two_processes_resume_what_one_or_two_have_saved(runs: Runs, name: str) -> None:
    for rank in runs.ranks:
        assert rank[name]["losses"] == pytest.approx(runs.one["losses"][2 * STOP :], abs=1e-5)


@pytest.mark.parametrize("saved", ["single", "ddp", "fsdp2"])
def test_one_process_resumes_what_one_or_two_have_saved(runs: Runs, saved: str) -> None:
    result = fit("single", runs.llama, runs.folder, f"{saved}-one", runs.folder / f"{saved}.ckpt")
    assert result["losses"] == pytest.approx(runs.one["losses"][2 * STOP :], abs=1e-5)


def test_a_checkpoint_is_that_of_one_process_and_no_base_was_gathered(runs: Runs) -> None:
    one, two = (torch.load(runs.folder / f"{name}.ckpt", weights_only=True) for name in ("single", "fsdp2"))
    assert one["state_dict"].keys() == two["state_dict"].keys() == runs.adapters("single").keys()
    sizes = {name: value.numel() for name, value in one["state_dict"].items()}
    for name, value in two["state_dict"].items():
        assert type(value) is torch.Tensor
        torch.testing.assert_close(value, one["state_dict"][name], rtol=0, atol=1e-5)
    ours, theirs = one["optimizer_states"][0], two["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in ours["state"].items():
        torch.testing.assert_close(theirs["state"][index], state, rtol=1e-3, atol=1e-6)
    paths = [runs.folder / f"{name}.ckpt" for name in ("single", "fsdp2")]
    assert abs(paths[0].stat().st_size - paths[1].stat().st_size) < 8192  # the second process's random state
    # each tensor that trains with its two moments, on both processes, and nothing else; the smallest base weight that
    # is a matrix is larger than any of them
    for rank in runs.ranks:
        assert sorted(rank["fsdp2"]["gathered"]) == sorted(3 * list(sizes.values()))
    assert max(sizes.values()) < 16 * 32


def test_merged_folders_are_those_of_one_process(runs: Runs) -> None:
    for step in (10, 20):
        one, two = (
            AutoModelForCausalLM.from_pretrained(runs.folder / f"{name}-saved" / f"step={step}-merged")
            for name in ("single", "fsdp2")
        )
        for (name, ours), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=name)
    assert {p.name for p in (runs.folder / "single-saved").iterdir()} == {
        p.name for p in (runs.folder / "fsdp2-saved").iterdir()
    }


def test_an_evaluation_sees_the_weights_that_are_there(runs: Runs) -> None:
    """After a fit, of an earlier checkpoint, and of weights that were changed in the shards."""
    final, earlier, swapped, back = runs.one["validated"]
    assert min(abs(earlier - final), abs(swapped - earlier)) > 1e-3
    assert back == pytest.approx(earlier, abs=1e-5)
    for rank in runs.ranks:
        assert rank["fsdp2"]["validated"] == pytest.approx(runs.one["validated"], abs=2e-5)


def test_strategies_that_cannot_be_are_refused(runs: Runs) -> None:
    for rank in runs.ranks:
        assert "set save_distributed_checkpoint: false" in rank["errors"]["distributed"]
        assert "set tensor_parallel_size: 1" in rank["errors"]["tensor"]


def test_fsdp1_is_refused_with_the_alternative(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(callbacks=[ShardedTraining()])
    # Lightning itself asks for a GPU before it makes a Trainer with it
    monkeypatch.setattr(Trainer, "strategy", FSDPStrategy())
    with pytest.raises(ValueError, match=r"FSDPStrategy \(FSDP1\).*use FSDP2: strategy: \{class_path"):
        trainer.callbacks[0].setup(trainer, Plain(), "fit")


# One process ---------------------------------------------------------------------------------------------------------


def test_the_frozen_base_is_cast_and_nothing_else(make_trainer: MakeTrainer) -> None:
    class Counting(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3))

    module = Counting()
    # no blocks are needed here, and the module has none
    trainer = make_trainer(max_epochs=1, precision="bf16-mixed", callbacks=[ShardedTraining(), DoRA(rank=2)])
    trainer.fit(module, make_loader())
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert module.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_base_dtypes(make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, dtype: Any) -> None:
    module = make_backbone()
    callbacks = [ShardedTraining(base_dtype=dtype)]
    make_trainer(max_steps=2, limit_val_batches=0, precision="bf16-mixed", callbacks=callbacks).fit(
        module, datamodule=make_data()
    )
    dtypes = {p.requires_grad: p.dtype for p in module.parameters()}
    assert dtypes == {True: torch.float32, False: getattr(torch, dtype or "float32")}


@pytest.mark.parametrize("extra", [{}, {"method": "magnitude"}])
def test_magnitudes_start_as_the_norms_of_the_cast_base(make_trainer: MakeTrainer, extra: Any) -> None:
    class AtStart(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            layers = [layer for _, layer in adapter_layers(pl_module)]
            assert layers
            for layer in layers:
                exact = layer.weight.double().norm(dim=1)
                assert layer.weight.dtype == torch.bfloat16
                assert torch.allclose(layer.magnitude.double(), exact, rtol=1e-6)
                assert torch.equal(layer.magnitude, layer.norm())

    options = extra or {"rank": 2}
    trainer = make_trainer(
        max_steps=1, precision="bf16-mixed", callbacks=[ShardedTraining(), DoRA(**options), AtStart()]
    )
    trainer.fit(Plain(), make_loader())


def test_integers_stay_as_they_are() -> None:
    module = nn.Module()
    module.codes = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    cast_frozen(module, torch.bfloat16)
    assert module.codes.dtype == torch.uint8


class Blocks(Plain):
    """A stack of blocks in a ModuleList, which count how often they run."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return x + self.linear(x).relu()

    def __init__(self) -> None:
        super().__init__()
        self.net["encoder"] = nn.Sequential()
        self.net["blocks"] = nn.ModuleList([self.Block(), self.Block()])
        self.net["head"] = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.net["blocks"]:
            x = block(x)
        return self.net["head"](x)


def test_activation_checkpointing_recomputes_once_and_changes_nothing(make_trainer: MakeTrainer) -> None:
    def fit_blocks(*callbacks: Any) -> Blocks:
        torch.manual_seed(0)
        module = Blocks()
        trainer = make_trainer(max_epochs=2, callbacks=[DoRA(rank=2), *callbacks])
        trainer.fit(module, make_loader())
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, make_loader())  # prepared twice
        return module

    plain = fit_blocks()
    recomputed = fit_blocks(ShardedTraining(None, activation_checkpointing=True))
    assert recomputed.losses == plain.losses
    assert all(torch.equal(value, values(plain)[name]) for name, value in values(recomputed).items())
    assert plain.net["blocks"][0].runs == 16
    assert recomputed.net["blocks"][0].runs == 32


def test_blocks_are_found_as_declared_by_name_or_by_repetition(make_backbone: MakeBackbone) -> None:
    module = make_backbone()
    module.configure_model()
    assert find_blocks(module) == list(module.language_model.model.layers)
    assert find_blocks(module, ["LlamaMLP"]) == [layer.mlp for layer in module.language_model.model.layers]
    assert len(find_blocks(Blocks())) == 2


def test_blocks_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"no transformer blocks found \(blocks=\['Blok'\]\).*What repeats: Block"):
        find_blocks(Blocks(), ["Blok"])
    with pytest.raises(ValueError, match="What repeats: nothing in a ModuleList"):
        find_blocks(Plain())


def test_bad_dtype() -> None:
    with pytest.raises(ValueError, match="base_dtype must be null or one of float32, bfloat16, float16, got 'int8'"):
        ShardedTraining("int8")


def test_checkpointing_of_a_block_by_hand_is_not_nested() -> None:
    block = Blocks.Block()
    for _ in range(3):
        checkpoint_activations(block)
    block(torch.ones(1, 8, requires_grad=True)).sum().backward()
    assert block.runs == 2


def test_every_name_of_a_block_must_match(make_trainer: MakeTrainer) -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 8)])
    with pytest.raises(ValueError, match=r"no transformer blocks found \('Typo' of blocks="):
        find_blocks(model, ["TransformerEncoderLayer", "Typo"])
    # on one device without activation checkpointing, where no blocks are needed, too
    with pytest.raises(ValueError, match="no transformer blocks found"):
        make_trainer(callbacks=[DoRA(rank=2), ShardedTraining(None, blocks=["Typo"])]).fit(Plain(), make_loader())
