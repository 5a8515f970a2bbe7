"""Checkpoints of DoRAVLBart merged, and loaded again: tied embeddings, biases, norms, towers and their statistics."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tiny import MakeTrainer
from tiny_vl_bart import save_bart
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import BartForConditionalGeneration
from vl_bart_adapters import ALL, adapted, inputs, logits, parts_of, save

from dora_lightning import merge_adapters
from dora_lightning.backbones import DoRAVLBart
from dora_lightning.callbacks import MergeOnSave
from dora_lightning.offline import merge
from dora_lightning.training.adapter_checkpoint import read_adapter_checkpoint
from dora_lightning.training.merging import merge_to_folder
from dora_lightning.vl_bart import VLBart, load_vl_bart


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def half_bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BART whose files are bf16."""
    folder = save_bart(tmp_path_factory.mktemp("half"))
    network: torch.nn.Module = BartForConditionalGeneration.from_pretrained(folder)
    network.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def also(tower: str) -> list[str]:
    return ALL if tower == "features" else [*ALL, "vision_tower"]


@pytest.mark.parametrize("tower", ["features", "vit", "resnet"])
def test_merged_folder_equals_the_model_of_the_checkpoint(
    bart: Path, tmp_path: Path, make_trainer: MakeTrainer, tower: str
) -> None:
    parts = parts_of(bart, tower)
    module = adapted(parts, also_trained=also(tower))
    module.language_model(**inputs(tower))  # in training mode, where a ResNet's statistics change
    checkpoint = save(module, make_trainer(), tmp_path / "adapter.ckpt")
    expected = logits(module.language_model, tower)
    merge(checkpoint, str(tmp_path / "merged"))
    merged = VLBart.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tower), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.lm_head.weight, module.language_model.lm_head.weight, rtol=0, atol=0)
    base = load_vl_bart(parts)
    assert (logits(base, tower) - expected).abs().max() > 0.1
    # every part that was trained is another one than the base's
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    kinds = ["shared", "embed_positions", "k_proj.bias", "layernorm_embedding.weight", "visual_embedding.box"]
    kinds += {"features": [], "vit": ["vision_tower"], "resnet": ["running_mean", "running_var", "num_batches"]}[tower]
    assert all(any(kind in name for name in changed) for kind in kinds)


@pytest.mark.parametrize("tower", ["features", "vit", "resnet"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_base_in_half_precision_gives_the_merged_weights_rounded_once(
    half_bart: Path, tmp_path: Path, make_trainer: MakeTrainer, tower: str, dtype: str
) -> None:
    module = adapted(parts_of(half_bart, tower), also_trained=also(tower), dtype=dtype)
    checkpoint = save(module, make_trainer(), tmp_path / "adapter.ckpt")
    merge(checkpoint, str(tmp_path / "merged"))
    expected = merge_adapters(module.language_model, unload=True).to(torch.bfloat16)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.bfloat16}
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in stored.items())
    merged = VLBart.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tower), logits(expected, tower), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("when", ["checkpoint", "fit_end"])
@pytest.mark.parametrize("tower", ["features", "resnet"])
def test_merged_while_it_trains(bart: Path, tmp_path: Path, make_trainer: MakeTrainer, tower: str, when: str) -> None:
    parts = parts_of(bart, tower)
    optimizer = partial(AdamW, lr=0.01)
    module = adapted(parts, perturbed=False, also_trained=also(tower), optimizer=optimizer)
    batch = inputs(tower)
    text = {name: batch.pop(name) for name in ("input_ids", "attention_mask", "labels")}
    loader: Any = DataLoader([text | {"vision": batch}] * 3, batch_size=None)  # type: ignore[list-item,arg-type]
    saver = ModelCheckpoint(dirpath=tmp_path, filename="run")
    make_trainer(callbacks=[saver, MergeOnSave(when)], log_every_n_steps=1).fit(module, loader, loader)
    merged = VLBart.from_pretrained(tmp_path / ("merged" if when == "fit_end" else "run-merged"))
    expected = logits(module.language_model, tower)
    torch.testing.assert_close(logits(merged, tower), expected, rtol=1e-4, atol=1e-4)
    assert (logits(load_vl_bart(parts), tower) - expected).abs().max() > 0.1


def test_a_resnet_trains_on_a_base_in_half_precision(half_bart: Path) -> None:
    module = adapted(parts_of(half_bart, "resnet"), also_trained=also("resnet"))
    with torch.autocast("cpu", torch.bfloat16):
        module.language_model(**inputs("resnet")).loss.backward()
    assert all(p.grad is not None for p in module.language_model.vision_tower.parameters())


def test_gathered_names_of_a_tied_weight_need_not_share_memory(
    bart: Path, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    module = adapted(parts_of(bart, "features"), also_trained=ALL)
    adapter = read_adapter_checkpoint(save(module, make_trainer(), tmp_path / "adapter.ckpt"))
    adapter.tensors = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    folder = merge_to_folder(adapter.base["name"], adapter, tmp_path / "merged")
    torch.testing.assert_close(
        logits(VLBart.from_pretrained(folder), "features"), logits(module.language_model, "features")
    )
    # one that was trained apart has no place in the files
    adapter.tensors["lm_head.weight"] += 1
    with pytest.raises(ValueError, match=r"has no weight lm_head\.weight, which the adapter belongs to"):
        merge_to_folder(adapter.base["name"], adapter, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Loaded again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["features", "vit", "resnet"])
def test_loaded_again_where_the_cache_is_empty(
    bart: Path, tmp_path: Path, cache: Path, make_trainer: MakeTrainer, tower: str
) -> None:
    module = adapted(parts_of(bart, tower), also_trained=also(tower))
    module.language_model(**inputs(tower))
    expected = logits(module.language_model, tower)
    checkpoint = save(module, make_trainer(), tmp_path / "adapter.ckpt")
    shutil.rmtree(cache)
    torch.manual_seed(3)
    loaded = DoRAVLBart.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.parts == module.parts
    torch.testing.assert_close(logits(loaded.language_model, tower), expected, rtol=0, atol=0)
    shutil.rmtree(cache)
    merge(checkpoint, str(tmp_path / "merged"))
    torch.testing.assert_close(logits(VLBart.from_pretrained(tmp_path / "merged"), tower), expected)


def test_a_checkpoint_of_a_named_bart(bart: Path, tmp_path: Path, cache: Path, make_trainer: MakeTrainer) -> None:
    module = adapted(str(bart), also_trained=ALL)
    checkpoint = save(module, make_trainer(), tmp_path / "adapter.ckpt")
    expected = {name: value.clone() for name, value in merge_adapters(module.language_model).state_dict().items()}
    shutil.rmtree(cache)
    for number, base in enumerate((None, str(bart))):
        merge(checkpoint, str(tmp_path / f"merged{number}"), base=base)
        stored = load_file(tmp_path / f"merged{number}" / "model.safetensors")
        assert all(torch.equal(v, expected.get(n, v)) for n, v in stored.items())
        name = "model.encoder.layers.0.self_attn.q_proj"
        assert torch.equal(stored[f"{name}.weight"], expected[f"{name}.base_layer.weight"])


def test_another_base_is_refused_by_name(bart: Path, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    checkpoint = save(adapted(parts_of(bart, "features")), make_trainer(), tmp_path / "adapter.ckpt")
    other = parts_of(save_bart(tmp_path / "other", seed=1), "features")
    message = r"trained on another base model: '.*/bart\d+-\w+', not '.*/other-\w+' \(.*weight holds other values\)"
    with pytest.raises(ValueError, match=message):
        DoRAVLBart.load_from_checkpoint(checkpoint, weights_only=True, model_name_or_path=other)
    folder = load_vl_bart(other).name_or_path
    with pytest.raises(ValueError, match=message):
        merge(checkpoint, str(tmp_path / "merged"), base=folder)
    assert not (tmp_path / "merged").exists()


def test_other_parts_that_train_are_refused(bart: Path, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    checkpoint = save(adapted(parts_of(bart, "features")), make_trainer(), tmp_path / "adapter.ckpt")
    for others in (["visual_embedding", "biases"], ALL):
        with pytest.raises(
            ValueError, match=r"in the checkpoint also_trained is visual_embedding, biases, layer_norms, and here"
        ):
            DoRAVLBart.load_from_checkpoint(checkpoint, weights_only=True, also_trained=others)
