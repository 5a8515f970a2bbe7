"""Learning patterns of a run: what is written down is what the weights say, and training is not touched."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.optim import AdamW
from transformers import LlamaForCausalLM

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import MakeBackbone, MakeData, MakeTrainer
from two_processes import fit_and_save, run_on_one_and_two

ALL = ["q_proj", "v_proj", "down_proj"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "learning_pattern.jsonl").read_text().splitlines()]


def by_the_book(before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    old, new = before.double(), after.double()
    cosine = torch.nn.functional.cosine_similarity(old, new, dim=1)
    delta_m, delta_d = (new.norm(dim=1) - old.norm(dim=1)).abs().mean(), (1 - cosine).mean()
    return {"delta_m": pytest.approx(float(delta_m), rel=1e-4), "delta_d": pytest.approx(float(delta_d), rel=1e-4)}


class Watch(Callback):
    """Losses, bit for bit, and the weights of the linear modules after some steps, merged in float64 by hand."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []
        self.merged: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step in self.steps:
            self.merged[trainer.global_step] = {}
            for name, module in pl_module.language_model.named_modules():
                if not name.endswith(tuple(ALL)):
                    continue
                weight = module.weight.detach().double().clone()
                if hasattr(module, "lora_A"):
                    weight += module.scaling * module.lora_B.detach().double() @ module.lora_A.detach().double()
                if hasattr(module, "magnitude"):
                    weight *= (module.magnitude.detach().double() / weight.norm(dim=1))[:, None]
                self.merged[trainer.global_step][name] = weight


@pytest.mark.parametrize("method", ["dora", "lora", "full"])
def test_rows_are_what_the_weights_say(
    method: str,
    make_backbone: MakeBackbone,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    tiny_llama: Path,
) -> None:
    from dora_lightning.callbacks import WeightDecomposition

    adapter = {"method": method, "target_modules": ALL} | ({"rank": 16} if method == "full" else {})
    watch, logger = Watch(3, 4, 7), CSVLogger(tmp_path, "", "")
    callback = WeightDecomposition(every_n_steps=4, steps=[3])
    make_trainer(max_steps=7, callbacks=[watch, callback], logger=logger, log_every_n_steps=1).fit(
        make_backbone(adapter=adapter), datamodule=make_data()
    )
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [3] * 6 + [4] * 6 + [7] * 6
    base = LlamaForCausalLM.from_pretrained(tiny_llama)
    for row in found:
        module = f"model.layers.{row['layer']}.{'mlp' if row['type'] == 'down_proj' else 'self_attn'}.{row['type']}"
        start = base.get_submodule(module).weight.detach()
        moved = by_the_book(start, watch.merged[row["step"]][module])
        assert row == {k: row[k] for k in ("step", "type", "layer")} | {"module": module, "method": method} | moved
    # the base's own files hold where full fine-tuning started
    assert not (tmp_path / "start_weights.safetensors").exists()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    logged = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    at_end = [row for row in found if row["step"] == 7 and row["type"] == "q_proj"]
    assert float(logged["learning_pattern/q_proj/delta_m"]) == pytest.approx(sum(r["delta_m"] for r in at_end) / 2)
    pairs = torch.tensor([[row["delta_d"], row["delta_m"]] for row in found], dtype=torch.float64)
    assert float(logged["learning_pattern/correlation"]) == pytest.approx(float(torch.corrcoef(pairs.T)[0, 1]))


@pytest.mark.parametrize("method", ["dora", "full"])
def test_training_goes_as_without_it(
    method: str, make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    from dora_lightning.callbacks import WeightDecomposition

    adapter = {"method": method, "target_modules": ALL}
    adapter |= {"rank": 16} if method == "full" else {"dropout": 0.2}
    losses = []
    for callbacks in ([WeightDecomposition(every_n_steps=1)], []):
        watch = Watch()
        torch.manual_seed(1)
        make_trainer(max_steps=8, callbacks=[watch, *callbacks]).fit(
            make_backbone(adapter=adapter), datamodule=make_data()
        )
        losses.append(watch.losses)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_goes_on_writes_each_step_once(elsewhere: bool, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """In its own folder and in another one, where the start of a module without a base is still the first run's."""
    from plain_modules import Plain, SaveAt, make_loader

    from dora_lightning.callbacks import WeightDecomposition

    def fit(folder: Path, *callbacks: Callback, every: int = 3, **options: Any) -> list[dict[str, Any]]:
        trainer = make_trainer(
            max_epochs=4, callbacks=[WeightDecomposition(every_n_steps=every), *callbacks], default_root_dir=folder
        )
        trainer.fit(Plain(), make_loader(), **options)
        return rows(folder)

    expected = fit(tmp_path / "whole")
    assert [row["step"] for row in expected[::3]] == [3, 6, 9, 12, 15, 16]
    assert [row["module"] for row in expected[:3]] == ["net.encoder.0", "net.encoder.2", "net.head"]
    assert [(row["type"], row["layer"]) for row in expected[:3]] == [("encoder", 0), ("encoder", 2), ("head", None)]
    checkpoint = tmp_path / "at8.ckpt"
    first = tmp_path / "first"
    # what comes after the checkpoint is of a run that was lost
    fit(first, SaveAt(checkpoint, 8))
    second = tmp_path / "second" if elsewhere else first
    resumed = fit(second, ckpt_path=checkpoint, weights_only=True)
    assert resumed == [row for row in expected if not elsewhere or row["step"] > 8]
    assert (first / "start_weights.safetensors").is_file()
    if elsewhere:
        (first / "start_weights.safetensors").unlink()
        with pytest.raises(ValueError, match=r"kept where its weights started in .*first/start_weights.*, now gone"):
            fit(tmp_path / "third", ckpt_path=checkpoint, weights_only=True)
    else:
        # rows of the lost steps go, even where nothing takes their place
        assert [row["step"] for row in fit(first, every=4, ckpt_path=checkpoint, weights_only=True)[::3]] == [
            3,
            6,
            12,
            16,
        ]
    # a new run in the same folder begins anew
    assert fit(second) == expected


def test_only_the_modules_that_are_named(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    from dora_lightning.callbacks import WeightDecomposition

    for modules, expected in (
        (["v_proj"], {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"}),
        (r"model\.layers\.1\.self_attn", {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}),
    ):
        trainer = make_trainer(max_steps=1, callbacks=[WeightDecomposition(modules=modules)])
        trainer.fit(make_backbone(), datamodule=make_data())
        assert {row["module"] for row in rows(tmp_path)} == expected
    for bad, message in (
        (["query"], "WeightDecomposition: modules: 'query' matches no module. .*q_proj"),
        (["o_proj"], "matches modules, but none that train"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(max_steps=1, callbacks=[WeightDecomposition(modules=bad)]).fit(
                make_backbone(), datamodule=make_data()
            )


def test_a_measurement_writes_its_own_rows_alone(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plain_modules import Plain, make_loader

    from dora_lightning.adapters.analysis import WeightChange, correlation
    from dora_lightning.analyzing import records
    from dora_lightning.callbacks import WeightDecomposition, weight_decomposition

    written: list[int] = []

    def counted(path: Path, some: list[Any], write: Any) -> None:
        written.append(len(some))
        write(path, some)

    for name in ("write_records", "append_records"):
        monkeypatch.setattr(weight_decomposition, name, partial(counted, write=getattr(records, name)))
    callback = WeightDecomposition(every_n_steps=1)
    for _ in range(2):  # the rows of a new fit replace those of the first
        written.clear()
        make_trainer(max_epochs=4, callbacks=[callback], default_root_dir=tmp_path).fit(Plain(), make_loader())
        assert written == [3] * 16
        found = rows(tmp_path)
        assert [row["step"] for row in found] == [step for step in range(1, 17) for _ in range(3)]
    for kind, running in callback._correlations.items():
        some = [row for row in found if kind in ("", f"{row['type']}/")]
        expected = correlation([WeightChange(row["delta_m"], row["delta_d"]) for row in some])
        assert running.value().r == pytest.approx(expected.r, rel=1e-9)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_line_cut_in_two_is_dropped(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    from plain_modules import Plain, SaveAt, make_loader

    from dora_lightning.analyzing.records import read_records
    from dora_lightning.callbacks import WeightDecomposition

    def fit(*callbacks: Callback, **options: Any) -> None:
        trainer = make_trainer(
            max_epochs=4, callbacks=[WeightDecomposition(every_n_steps=3), *callbacks], default_root_dir=tmp_path
        )
        trainer.fit(Plain(), make_loader(), **options)

    fit(SaveAt(tmp_path / "at8.ckpt", 8))
    expected = rows(tmp_path)
    path = tmp_path / "learning_pattern.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[: len(text) - 40])
    assert len(read_records(path)) == len(expected) - 1
    fit(ckpt_path=tmp_path / "at8.ckpt", weights_only=True)
    assert rows(tmp_path) == expected


def test_bad_steps_are_refused() -> None:
    from dora_lightning.callbacks import WeightDecomposition

    with pytest.raises(ValueError, match="every_n_steps must be at least 1, or null for none beside steps, found 0"):
        WeightDecomposition(every_n_steps=0)
    with pytest.raises(ValueError, match="steps must be at least 1, found 0"):
        WeightDecomposition(steps=[0, 5])


# Two processes -------------------------------------------------------------------------------------------------------


def fit(kind: str, llama: str, folder: Path, devices: int) -> None:
    """Adapters, an embedding that trains in full from the base's files, and an output embedding that is no file's."""
    import os

    from callbacks.sharded_run import Words  # of tests/callbacks

    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRALlama
    from dora_lightning.callbacks import WeightDecomposition

    class Mixed(DoRALlama):
        def inject(self, model: Any) -> None:
            super().inject(model)
            model.model.embed_tokens.requires_grad_(True)
            model.lm_head.requires_grad_(True)
            with torch.no_grad():
                model.lm_head.weight.mul_(1.25)

    class Steps(WeightDecomposition):
        def __init__(self) -> None:
            super().__init__(every_n_steps=5)
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, *args)
            self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))

        def written(self) -> dict[str, Any]:
            return {"losses": self.losses, "start": self._snapshot}

    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.chdir(folder)
    config = AdapterConfig(rank=4, target_modules=["q_proj", "v_proj", "up_proj"])
    module = Mixed(llama, config, partial(AdamW, lr=0.01))
    fit_and_save(kind, module, Words(llama, batch_size=4 // devices), Steps(), folder, devices, epochs=1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_write_what_one_writes(kind: str, untied_llama: Path, tmp_path: Path) -> None:
    run_on_one_and_two(__file__, kind, untied_llama, tmp_path)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in one[::8]] == [5, 10, 12]
    assert {row["method"] for row in one} == {"dora", "full"}
    for ours, theirs in zip(one, two, strict=True):
        close = {name: pytest.approx(ours[name], rel=1e-2) for name in ("delta_m", "delta_d")}
        assert theirs == ours | close
        assert ours["delta_d"] > 0
    from safetensors import safe_open

    for place in ("one", "two"):
        with safe_open(tmp_path / place / "start_weights.safetensors", framework="pt") as snapshot:
            assert list(snapshot.keys()) == ["model.lm_head.weight"]


if __name__ == "__main__":
    fit(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
