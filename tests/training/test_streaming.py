"""A model built on the meta device starts as one with weights does, and no process reads more than its own rows."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import MakeBackbone, MakeData, MakeLlama, MakeTrainer
from torch import nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

CPU = torch.device("cpu")

# every weight's rows over two processes are uneven for one of: rank 3, 9 key-value rows, 27 inner rows
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"llama": {"tied": False, "shard_size": "20KB"}, "adapter": {"magnitude_only_modules": ["up_proj"]}},
    "bf16": {"llama": {"tied": False, "dtype": "bfloat16"}},
    "cast": {"base_dtype": "bfloat16"},
    "columns": {"adapter": {"norm_axis": "in"}},
    "vera": {"adapter": {"method": "dvora"}},
    "lookup": {"llama": {"tied": False}, "adapter": {"target_modules": ["embed_tokens", "q_proj"], "init": "gaussian"}},
}


def identity_of(module: Any) -> dict[str, Any]:
    return module._run._base


def assert_same_identity(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert {key: ours[key] for key in ("checksums", "digests", "dtypes", "name")} == {
        key: theirs[key] for key in ("checksums", "digests", "dtypes", "name")
    }
    assert ours["projections"].keys() == theirs["projections"].keys()
    for key, value in ours["projections"].items():
        assert value == pytest.approx(theirs["projections"][key], rel=1e-4, abs=1e-4 * value[-1] ** 0.5)
    assert ours["samples"].keys() == theirs["samples"].keys()
    assert all(torch.equal(value, theirs["samples"][key]) for key, value in ours["samples"].items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_axis": "in"},
        {"magnitude_only_modules": ["up_proj", "o_proj"]},
        {"method": "dvora"},
        {"method": "full", "rank": 16},
        {"init": "gaussian", "rank_pattern": {"q_proj": 2}},
        {"init": "orthogonal"},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)
def test_starts_as_a_model_with_weights_does(
    make_llama: MakeLlama, make_backbone: MakeBackbone, tied: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    folder = make_llama(tied=tied, dtype=dtype, shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ordinary = make_backbone(folder, adapter=options)
    ordinary.configure_model()
    module = make_backbone(folder, adapter=options, meta_device=True)
    module.configure_model()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not any(buffer.is_meta for buffer in module.buffers())

    module._run.stream_base(module, CPU)
    expected = dict(ordinary.named_parameters()) | dict(ordinary.named_buffers())
    present = dict(module.named_parameters()) | dict(module.named_buffers())
    assert present.keys() == expected.keys()
    for name, value in present.items():
        assert value.requires_grad == expected[name].requires_grad
        # columns are summed in pieces
        columns = options.get("norm_axis") == "in" or "embed_tokens" in name
        tolerance = 1e-6 if name.endswith("magnitude") and columns else 0
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=0)
    assert any("inv_freq" in name for name in present)
    tokens = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(module.model(tokens).logits, ordinary.model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert (module.model.lm_head.weight is module.model.model.embed_tokens.weight) == tied
    assert module.model.training == ordinary.model.training
    assert module.model.generation_config == ordinary.model.generation_config
    assert_same_identity(identity_of(module), identity_of(ordinary))


def test_what_starts_from_whole_weights_is_refused(make_llama: MakeLlama, make_backbone: MakeBackbone) -> None:
    module = make_backbone(make_llama(), adapter={"init": "pissa"}, meta_device=True)
    module.configure_model()
    with pytest.raises(ValueError, match=r"init='pissa' starts from whole weights; build the model with its weights"):
        module._run.stream_base(module, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (3, 3), (5,), (64, 16), (1, 1), (9, 2), (9, 3001, 5), (70000,)])
def test_identity_of_pieces_is_that_of_the_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from dora_lightning.training.base_identity import StreamedIdentity, base_identity

    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), False)
    expected = base_identity(model, "base")
    step = max(1, shape[0] // 64)
    for cuts in ([0, shape[0]], [0, 1, shape[0]], [0, shape[0] // 2, shape[0]], [*range(0, shape[0], step), shape[0]]):
        parts = [StreamedIdentity("base", {"weight": dtype}, {}) for _ in range(2)]
        for number, (start, stop) in enumerate(pairwise(cuts)):
            row = model.weight[:1].numel()
            parts[number % 2].add("weight", model.weight[start:stop], start * row, model.weight.numel())
        assert_same_identity(parts[0].whole([part.parts() for part in parts]), expected)


@pytest.mark.parametrize("base_dtype", [None, "bfloat16"])
def test_one_device_trains_as_with_weights(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, base_dtype: str | None
) -> None:
    from dora_lightning.callbacks import ShardedTraining

    losses: dict[bool, list[float]] = {}
    for meta_device in (False, True):
        seen = Losses()
        module = make_backbone(meta_device=meta_device)
        trainer = make_trainer(callbacks=[ShardedTraining(base_dtype), seen], max_steps=5, limit_val_batches=0)
        torch.manual_seed(1)
        trainer.fit(module, datamodule=make_data())
        losses[meta_device] = seen.seen
        path = Path(trainer.default_root_dir, f"{meta_device}.ckpt")
        trainer.save_checkpoint(path)
    assert len(losses[True]) == 5
    assert losses[True] == losses[False]
    ours, theirs = (torch.load(path.with_name(f"{meta}.ckpt"), weights_only=True) for meta in (True, False))
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())
    # what loads a checkpoint without a Trainer gets the weights
    loaded = type(module).load_from_checkpoint(path)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_stops_where_nothing_would_load_the_weights(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match=r"add the callback ShardedTraining, or set meta_device: false"):
        make_trainer(max_steps=1).fit(make_backbone(meta_device=True), datamodule=make_data())


def changed(folder: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    for name, value in changes.items():
        weights.pop(name)
        if value is not None:
            weights[name] = value
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"holds no weight model.layers.1.mlp.up_proj.weight, which the model needs"),
        (torch.zeros(48, 31), r"model.layers.1.mlp.up_proj.weight is \[48, 31\] in .*, and \[48, 32\] in the model"),
    ],
)
def test_a_missing_or_other_weight_is_refused_by_name(
    untied_llama: Path, tmp_path: Path, make_backbone: MakeBackbone, value: torch.Tensor | None, message: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed(untied_llama, tmp_path / "changed", **{name: value})
    module = make_backbone(folder, meta_device=True)
    module.configure_model()
    with pytest.raises(ValueError, match=message):
        module._run.stream_base(module, CPU)


@pytest.mark.parametrize(
    ("adapted", "message"),
    [
        (None, r"Plain has parameters on the meta device, and no adapters .* add the callback DoRA"),
        ("all", r"the adapted Plain is on the meta device and is no transformers model"),
        ("lm", None),
    ],
)
def test_a_plain_module_gets_its_weights_if_the_part_that_has_a_folder_is_adapted(
    tiny_llama: Path, make_trainer: MakeTrainer, adapted: str | None, message: str | None
) -> None:
    from dora_lightning.callbacks import DoRA, ShardedTraining
    from dora_lightning.pretrained import load_causal_lm

    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.lm = load_causal_lm(str(tiny_llama), meta_device=True).train()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.lm(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> AdamW:
            return AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    module = Plain()
    adapters = (
        [DoRA(rank=2, target_modules=["q_proj"], module=None if adapted == "all" else adapted)] if adapted else []
    )
    trainer = make_trainer(callbacks=[*adapters, ShardedTraining(None)], max_steps=1)
    batches = DataLoader(torch.randint(3, 384, (2, 8)), batch_size=2)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            trainer.fit(module, batches)
        return
    trainer.fit(module, batches)
    stored = load_file(tiny_llama / "model.safetensors")
    assert torch.equal(module.lm.model.norm.weight, stored["model.norm.weight"])


def test_a_trainer_stops_with_the_name_of_a_missing_weight(
    untied_llama: Path, tmp_path: Path, make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    from dora_lightning.callbacks import ShardedTraining

    folder = changed(untied_llama, tmp_path / "changed", **{"lm_head.weight": None})
    trainer = make_trainer(callbacks=[ShardedTraining(None)], max_steps=1)
    with pytest.raises(ValueError, match=r"holds no weight lm_head.weight"):
        trainer.fit(make_backbone(folder, meta_device=True), datamodule=make_data())


def test_a_base_without_safetensors_is_refused(tiny_llama: Path, tmp_path: Path, make_backbone: MakeBackbone) -> None:
    shutil.copytree(tiny_llama, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    module = make_backbone(tmp_path / "empty", meta_device=True)
    module.configure_model()
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        module._run.stream_base(module, CPU)


def test_an_adapter_cannot_be_put_into_a_model_without_weights(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    from dora_lightning.adapters import load_peft_adapter, save_peft_adapter

    modules = [make_backbone(meta_device=meta_device) for meta_device in (False, True)]
    for module in modules:
        module.configure_model()
    folder = save_peft_adapter(modules[0].model, tmp_path / "adapter")
    load_peft_adapter(modules[0].model, folder)
    with pytest.raises(ValueError, match=r"is on the meta device"):
        load_peft_adapter(modules[1].model, folder)


# Two processes -------------------------------------------------------------------------------------------------------


class Losses(Callback):
    """Writes down the loss of every batch on this process."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


class Held(Callback):
    """Counts what this process holds of each parameter when training starts."""

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        held = [(p.to_local() if hasattr(p, "to_local") else p).numel() for p in module.parameters()]
        whole = [p.numel() for p in module.parameters()]
        frozen = [not p.requires_grad for p in module.parameters()]
        shares = [part / of for part, of, is_frozen in zip(held, whole, frozen, strict=True) if is_frozen]
        self.counts = {"largest_share": max(shares), "share": sum(held) / sum(whole)}


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation allocates; views, also of a mapped file, are none."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        def plain(tree: Any) -> list[torch.Tensor]:
            # what an operation on a sharded tensor does to the shard is seen by itself
            tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
            return [tensor for tensor in tensors if not isinstance(tensor, DTensor)]

        result = func(*args, **(kwargs or {}))
        present = {tensor.untyped_storage().data_ptr() for tensor in plain((args, kwargs))}
        for tensor in plain(result):
            if func is not torch.ops.aten.set_.source_Storage and tensor.untyped_storage().data_ptr() not in present:
                self.numel = max(self.numel, tensor.numel())
        return result


class Rows:
    """Stands in for ``safe_open``: writes down which rows are read, and hands out no whole tensor."""

    read: list[list[Any]]

    def __init__(self, *args: Any, **options: Any) -> None:
        self.opened = safe_open(*args, **options)

    def __enter__(self) -> Any:
        self.weights = self.opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.opened.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self.weights.keys())

    def get_slice(self, name: str) -> "Rows":
        rows = Rows.__new__(Rows)
        rows.name, rows.slice = name, self.weights.get_slice(name)
        return rows

    def get_shape(self) -> list[int]:
        return self.slice.get_shape()

    def __getitem__(self, rows: slice) -> torch.Tensor:
        Rows.read.append([self.name, rows.start, rows.stop])
        return self.slice[rows]


def token_batch(rows: list[torch.Tensor]) -> dict[str, Any]:
    tokens = torch.stack(rows)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens, "samples": []}


def fit(
    folder: Path, case: dict[str, Any], name: str, meta_device: bool, resume: str | None = None, strategy: Any = None
) -> None:
    """Train for two epochs of five steps; writes losses, checkpoints and what was read to ``folder``."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRALlama
    from dora_lightning.callbacks import ShardedTraining
    from dora_lightning.training import adapter_run, streaming

    adapter = {"rank": 3, "target_modules": ["q_proj", "k_proj", "down_proj"]} | case.get("adapter", {})
    torch.manual_seed(0)
    module = DoRALlama(
        str(folder / "llama"), AdapterConfig(**adapter), partial(AdamW, lr=0.01), meta_device=meta_device
    )
    tokens = torch.randint(3, 384, (20, 9), generator=torch.Generator().manual_seed(0))
    losses, held, largest = Losses(), Held(), LargestTensor()
    Rows.read = []
    streaming.safe_open = Rows  # type: ignore[attr-defined,assignment]

    def watched(*args: Any) -> Any:
        with largest:
            return streaming.stream_weights(*args)

    adapter_run.stream_weights = watched
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy
        or ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False),
        max_epochs=2,
        callbacks=[
            ShardedTraining(case.get("base_dtype")),
            losses,
            held,
            ModelCheckpoint(folder / name, "{epoch}", save_top_k=-1),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(list(tokens), batch_size=2, collate_fn=token_batch), ckpt_path=resume)
    result = {"losses": losses.seen, "read": Rows.read, "largest": largest.numel, **held.counts}
    (folder / name).mkdir(exist_ok=True)
    (folder / name / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


def run_cases(folder: str) -> None:
    """All that two processes are to do, in one launch."""
    torch.set_num_threads(1)
    for name, case in CASES.items():
        here = Path(folder, name)
        fit(here, case, "ordinary", meta_device=False)
        fit(here, case, "streamed", meta_device=True)
        if name in ("tied", "bf16"):
            fit(here, case, "ordinary_resumed", meta_device=False, resume=str(here / "streamed" / "epoch=0.ckpt"))
            fit(here, case, "streamed_resumed", meta_device=True, resume=str(here / "ordinary" / "epoch=0.ckpt"))
            fit(here, case, "streamed_ddp", meta_device=True, strategy="ddp")


@pytest.fixture(scope="module")
def two_processes(make_llama: MakeLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    for name, case in CASES.items():
        options = {"intermediate_size": 27, "num_key_value_heads": 2} | case.get("llama", {})
        if "dtype" in options:
            options["dtype"] = getattr(torch, options["dtype"])
        shutil.copytree(make_llama(**options), folder / name / "llama")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, __file__, str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_sharded_losses_are_those_of_an_ordinary_start(two_processes: Path, case: str) -> None:
    ordinary, streamed = read(two_processes / case, "ordinary"), read(two_processes / case, "streamed")
    assert ordinary[0]["losses"] != ordinary[1]["losses"]  # each sees its own samples
    tolerance = 1e-5 if case in ("columns", "lookup") else 1e-6  # norms of columns are summed over processes
    for ours, theirs in zip(streamed, ordinary, strict=True):
        assert len(ours["losses"]) == 10
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=tolerance)
        if case != "vera":  # whose vectors move the model too little in ten steps
            assert sum(ours["losses"][5:]) < sum(ours["losses"][:5]) - 0.1  # the same samples again
    for epoch in range(2):
        ours, theirs = (
            torch.load(two_processes / case / name / f"epoch={epoch}.ckpt", weights_only=True)
            for name in ("streamed", "ordinary")
        )
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        for name, value in ours["state_dict"].items():
            torch.testing.assert_close(value, theirs["state_dict"][name], rtol=1e-5, atol=1e-6)
        assert_same_identity(ours["dora_lightning"]["base"], theirs["dora_lightning"]["base"])


@pytest.mark.parametrize("case", ["tied", "bf16"])
@pytest.mark.parametrize("name", ["ordinary_resumed", "streamed_resumed"])
def test_checkpoints_of_both_starts_are_interchangeable(two_processes: Path, case: str, name: str) -> None:
    expected = read(two_processes / case, "ordinary")
    for ours, theirs in zip(read(two_processes / case, name), expected, strict=True):
        assert len(ours["losses"]) == 5
        assert ours["losses"] == pytest.approx(theirs["losses"][5:], abs=1e-6)


@pytest.mark.parametrize("case", ["tied", "bf16"])
def test_copies_on_every_process_train_as_shards_do(two_processes: Path, case: str) -> None:
    copies = read(two_processes / case, "streamed_ddp")
    assert all(rank["share"] == 1 for rank in copies)
    for ours, theirs in zip(copies, read(two_processes / case, "ordinary"), strict=True):
        assert len(ours["losses"]) == 10
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_no_process_reads_or_holds_more_than_its_rows(two_processes: Path, case: str) -> None:
    shapes: dict[str, int] = {}
    for file in (two_processes / case / "llama").glob("*.safetensors"):
        shapes |= {name: len(value) for name, value in load_file(file).items()}
    ranks = read(two_processes / case, "streamed")
    rows: dict[str, list[int]] = {name: [] for name in shapes}
    for rank in ranks:
        for name, start, stop in rank["read"]:
            assert stop - start <= (shapes[name] + 1) // 2
            rows[name] += range(start, stop)
        assert rank["largest_share"] < 0.6
        assert 0.45 < rank["share"] < 0.55
        assert 0 < rank["largest"] <= 384 * 32 // 2  # half of the embedding
    assert {name: sorted(seen) for name, seen in rows.items()} == {n: [*range(size)] for n, size in shapes.items()}
    assert all(not rank["read"] for rank in read(two_processes / case, "ordinary"))


if __name__ == "__main__":
    run_cases(sys.argv[1])
