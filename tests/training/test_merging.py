"""The streamed merge: the weights of the in-memory merge, little memory, and nothing half-written."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MakeBackbone, MakeData, MakeLlama, MakeTrainer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from dora_lightning import AdapterConfig, inject_adapters, merge_adapters
from dora_lightning.adapters.finite import NonFiniteError
from dora_lightning.files.folders import MARKER
from dora_lightning.training import merging
from dora_lightning.training.adapter_checkpoint import AdapterCheckpoint, frozen_names, read_adapter_checkpoint
from dora_lightning.training.base_identity import base_identity
from dora_lightning.training.merging import merge_to_folder
from tests.adapters.perturbed import perturb
from tests.adapters.zoo import KINDS

TARGETS: dict[str, Any] = {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def adapt(folder: Path, **options: Any) -> tuple[PreTrainedModel, AdapterCheckpoint]:
    """A model with a trained adapter, and that adapter as a checkpoint holds it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    inject_adapters(model, AdapterConfig(**(TARGETS | options)))
    torch.manual_seed(0)
    perturb(model)
    frozen = frozen_names(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in frozen}
    return model, AdapterCheckpoint(model.adapter_config, base_identity(model, str(folder)), tensors)


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MARKER}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "lora"},
        {"method": "magnitude", "rank": 16},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "magnitude_only_modules": ["o_proj", "gate_proj"]},
        {"norm_axis": "in"},
        {"alpha": 3.0},
        {"method": "vera"},
        {"method": "dvora", "projection_seed": 3},
        {"method": "dvora", "magnitude_only_modules": ["down_proj"]},
        {"method": "full", "rank": 16},
        {"init": "pissa"},
        {"method": "lora", "init": "olora", "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5.0}},
    ],
    ids=str,
)
def test_equals_the_model_merged_in_memory(tiny_llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model, adapter = adapt(tiny_llama, **options)
    assert merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged") == tmp_path / "merged"
    expected = merge_adapters(model, unload=True).state_dict()
    merged = weights(tmp_path / "merged")
    assert merged.keys() == weights(tiny_llama).keys()
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())
    base = weights(tiny_llama)
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert changed
    assert not any("norm" in name or "embed" in name for name in changed)


@pytest.mark.parametrize("method", ["dora", "lora", "dvora", "magnitude"])
def test_layers_that_store_their_weight_the_other_way_round(tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "tie_word_embeddings": False}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=1)).save_pretrained(tmp_path / "base")
    # attn.c_proj and wpe are square: their shape does not tell
    targets = ["c_attn", "attn.c_proj", "wpe", "lm_head"]
    model, adapter = adapt(
        tmp_path / "base", target_modules=targets, method=method, rank=16 if method == "magnitude" else 4
    )
    assert "transformer.h.0.attn.c_proj" in adapter.config.resolved["transposed"]
    merge_to_folder(str(tmp_path / "base"), adapter, tmp_path / "merged")
    expected = merge_adapters(model, unload=True).state_dict()
    merged, base = weights(tmp_path / "merged"), weights(tmp_path / "base")
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())
    assert sum(not torch.equal(value, base[name]) for name, value in merged.items()) == 2 * 2 + 2


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_every_kind_of_layer(tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({kind.replace(" ", "_"): spec.make() for kind, spec in KINDS.items()})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    rank = {} if method == "magnitude" else {"rank": 4}
    inject_adapters(model, AdapterConfig(method=method, target_modules=list(model), **rank))
    perturb(model)
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    adapter = AdapterCheckpoint(model.adapter_config, base_identity(model, "base"), tensors)
    merge_to_folder(str(tmp_path / "base"), adapter, tmp_path / "merged")
    expected = merge_adapters(model, unload=True).state_dict()
    merged, base = weights(tmp_path / "merged"), weights(tmp_path / "base")
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())
    assert sum(not torch.equal(value, base[name]) for name, value in merged.items()) == len(KINDS)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_weight_tied_to_another_module_s_is_refused(tiny_llama: Path, tmp_path: Path, target: str) -> None:
    _, adapter = adapt(tiny_llama, target_modules=[target, "q_proj"])
    with pytest.raises(ValueError, match=rf"the weight of .*{target} is tied to another module's.* merge in memory"):
        merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_stays_so(make_llama: MakeLlama, tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_llama(dtype=dtype)
    model, adapter = adapt(base)
    merge_to_folder(str(base), adapter, tmp_path / "merged")
    expected = merge_adapters(model, unload=True).state_dict()
    for name, value in weights(tmp_path / "merged").items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[name])


def test_a_base_in_shards(make_llama: MakeLlama, tmp_path: Path) -> None:
    base = make_llama(tied=False, shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    model, adapter = adapt(base)
    merge_to_folder(str(base), adapter, tmp_path / "merged")
    assert listing(tmp_path / "merged") == listing(base)
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "merged" / index).read_text()) == json.loads((base / index).read_text())
    ids = torch.arange(3, 40)[None]
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-4)


def test_other_trained_parts_are_written_too(tiny_llama: Path, tmp_path: Path) -> None:
    _, adapter = adapt(tiny_llama)
    adapter.tensors["model.norm.weight"] = torch.full((32,), 2.5)
    merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    assert torch.equal(weights(tmp_path / "merged")["model.norm.weight"], torch.full((32,), 2.5))


def test_transformers_loads_it_without_this_library(tiny_llama: Path, tmp_path: Path) -> None:
    model, adapter = adapt(tiny_llama)
    merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    ids = torch.arange(3, 40)[None]
    torch.save({"ids": ids, "logits": model.eval()(ids).logits.detach()}, tmp_path / "expected.pt")
    script = """
        import sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        expected = torch.load("expected.pt")
        model, info = AutoModelForCausalLM.from_pretrained("merged", output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=0, atol=1e-4)
        assert AutoTokenizer.from_pretrained("merged")("hot").input_ids
        assert not any("dora" in name for name in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Refusals ------------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_or_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    _, adapter = adapt(tiny_llama)
    output = tmp_path / "merged"
    merge_to_folder(str(tiny_llama), adapter, output)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"merged exists; choose another folder or pass overwrite"):
        merge_to_folder(str(tiny_llama), adapter, output)
    _, other = adapt(tiny_llama, rank=3)
    merge_to_folder(str(tiny_llama), other, output, overwrite=True)
    assert (output / "model.safetensors").read_bytes() != before
    assert listing(output) == listing(tiny_llama)
    assert listing(tmp_path) == {"merged"}


def test_a_folder_of_the_users_is_never_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    _, adapter = adapt(tiny_llama)
    output = tmp_path / "merged"
    output.mkdir()
    (output / "keep.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"merged is not replaced: it holds keep\.txt and no \.dora-lightning"):
        merge_to_folder(str(tiny_llama), adapter, output, overwrite=True)
    (output / "keep.txt").unlink()
    merge_to_folder(str(tiny_llama), adapter, output, overwrite=True)
    (output / "keep.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"it holds keep\.txt, which dora-lightning did not write there"):
        merge_to_folder(str(tiny_llama), adapter, output, overwrite=True)
    assert listing(output) == listing(tiny_llama) | {"keep.txt"}
    assert listing(tmp_path) == {"merged"}


def test_the_base_is_never_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    _, adapter = adapt(tiny_llama)
    # a base that merging made, which has a marker
    base = merge_to_folder(str(tiny_llama), adapter, tmp_path / "models" / "base")
    _, adapter = adapt(base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "models")
    for output in (base, base.parent, tmp_path / "link" / "base"):
        with pytest.raises(FileExistsError, match=r"is or holds .*base, which is still needed"):
            merge_to_folder(str(base), adapter, output, overwrite=True)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_another_base_is_refused(tiny_llama: Path, make_llama: MakeLlama, tmp_path: Path) -> None:
    _, adapter = adapt(tiny_llama)
    with pytest.raises(ValueError, match="trained on another base model"):
        merge_to_folder(str(make_llama(seed=1)), adapter, tmp_path / "merged")
    assert listing(tmp_path) == set()


def test_a_failure_leaves_what_was_there_before(tiny_llama: Path, make_llama: MakeLlama, tmp_path: Path) -> None:
    _, adapter = adapt(tiny_llama)
    merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    with pytest.raises(ValueError, match="another base"):
        merge_to_folder(str(make_llama(seed=1)), adapter, tmp_path / "merged", overwrite=True)
    assert listing(tmp_path) == {"merged"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before


def test_a_base_without_the_adapted_weights_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    _, adapter = adapt(tiny_llama)
    prefix = "model.layers.7.self_attn.q_proj"
    adapter.tensors |= {f"{prefix}.lora_A": torch.zeros(4, 32), f"{prefix}.lora_B": torch.zeros(32, 4)}
    adapter.tensors[f"{prefix}.magnitude"] = torch.ones(32)
    with pytest.raises(ValueError, match=r"has no weight model\.layers\.7\.self_attn\.q_proj\.weight"):
        merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    assert listing(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.mlp.down_proj.lora_A", (4, 31)),
        ("model.layers.1.mlp.down_proj.lora_B", (32, 5)),
        ("model.layers.1.mlp.down_proj.lora_B", (32, 2)),
        ("model.layers.1.mlp.down_proj.lora_B", (16, 4)),
        # one number would be broadcast, and would pass without a word
        ("model.layers.1.mlp.down_proj.magnitude", (1,)),
        ("model.norm.weight", (16,)),
    ],
)
def test_an_adapter_of_other_shapes_is_refused(
    tiny_llama: Path, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    _, adapter = adapt(tiny_llama)
    adapter.tensors[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"does not fit model\..*weight \(.*it has {'.*"):
        merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    assert listing(tmp_path) == set()


def test_a_base_that_is_no_model_folder_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    _, adapter = adapt(tiny_llama)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        merge_to_folder(str(tmp_path / "none"), adapter, tmp_path / "merged")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tiny_llama / "config.json", pickled)
    (pickled / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="holds no safetensors files"):
        merge_to_folder(str(pickled), adapter, tmp_path / "merged")


# A full disk ---------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_leaves_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = adapt(tiny_llama)
    write, written = merging._write_tensor, []

    def fill_up(writer: Any, tensor: torch.Tensor) -> None:
        if len(written) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(tensor.shape)
        write(writer, tensor)

    monkeypatch.setattr(merging, "_write_tensor", fill_up)
    with pytest.raises(
        OSError, match=r"the disk filled up while merging into .*merged; nothing was left there"
    ) as caught:
        merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    assert caught.value.errno == errno.ENOSPC
    assert listing(tmp_path) == set()


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = adapt(tiny_llama)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match=r"the merged model takes 0.00 GB and .* has 0.00 GB free") as caught:
        merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    assert caught.value.errno == errno.ENOSPC
    assert listing(tmp_path) == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, less than the tiny model takes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("looks_large", [False, True])
def test_a_disk_that_is_really_full(
    tiny_llama: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, looks_large: bool
) -> None:
    _, adapter = adapt(tiny_llama)
    if looks_large:  # as when another process fills it meanwhile
        monkeypatch.setattr(merging, "_check_space", lambda *_: None)
    with pytest.raises(OSError, match="the disk filled up" if looks_large else "GB free"):
        merge_to_folder(str(tiny_llama), adapter, small_disk / "merged")
    assert listing(small_disk) == set()


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "magnitude"])
def test_nan_is_not_merged(tiny_llama: Path, tmp_path: Path, part: str) -> None:
    _, adapter = adapt(tiny_llama)
    name = next(name for name in adapter.tensors if name.endswith(f"layers.1.self_attn.v_proj.{part}"))
    adapter.tensors[name].view(-1)[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"of the merged weights, as float32: model\.layers\.1\..*v_proj\.weight"):
        merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    assert listing(tmp_path) == set()


def test_what_overflows_in_the_dtype_of_the_base_is_not_merged(make_llama: MakeLlama, tmp_path: Path) -> None:
    base = make_llama(dtype=torch.float16)
    _, adapter = adapt(base)
    name = next(name for name in adapter.tensors if name.endswith("magnitude"))
    adapter.tensors[name].fill_(1e6)  # fp16 ends at 65504
    with pytest.raises(NonFiniteError, match="of the merged weights, as float16"):
        merge_to_folder(str(base), adapter, tmp_path / "merged")


# Memory --------------------------------------------------------------------------------------------------------------


def test_one_weight_is_in_memory_at_a_time(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = adapt(tiny_llama)
    write, earlier = merging._write_tensor, []

    def watch(writer: Any, tensor: torch.Tensor) -> None:
        if earlier:
            assert earlier[-1]() is None, "the weight before is still alive"
        earlier.append(weakref.ref(tensor))
        write(writer, tensor)

    monkeypatch.setattr(merging, "_write_tensor", watch)
    merge_to_folder(str(tiny_llama), adapter, tmp_path / "merged")
    assert len(earlier) == len(weights(tiny_llama))


MEMORY_SCRIPT = """
import sys, threading, time
from dora_lightning.training.adapter_checkpoint import read_adapter_checkpoint
from dora_lightning.training.merging import merge_to_folder
from tests.adapters.perturbed import perturb
from tests.adapters.zoo import KINDS
import torch

def anonymous_memory():
    # without pages of files, which the system takes back when it needs them
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1e3

adapter = read_adapter_checkpoint("adapter.ckpt")
before, peak, done = anonymous_memory(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_memory())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
merge_to_folder("base", adapter, "merged")
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory in use from /proc")
def test_memory_is_that_of_one_weight_not_of_the_model(make_llama: MakeLlama, tmp_path: Path) -> None:
    base = make_llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, dtype=torch.bfloat16)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e6
    assert size > 130
    _, adapter = adapt(base)
    entry = {"format_version": 1, "adapter": adapter.config.to_dict(), "base": adapter.base, "prefix": ""}
    torch.save({"state_dict": adapter.tensors, "dora_lightning": entry}, tmp_path / "adapter.ckpt")
    (tmp_path / "base").symlink_to(base)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    largest = 4096 * 1024 * 2 / 1e6
    # the weight as stored, and its fp32 copies while it is computed
    assert float(done.stdout) < 7 * largest < size / 2
    shutil.rmtree(tmp_path / "merged")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "vera"},
        {"method": "dvora"},
        {"method": "full", "rank": 16},
        {"init": "pissa"},
        {"init": "pissa_niter_2", "rank_pattern": {"v_proj": 2}},
        {"magnitude_only_modules": ["up_proj"], "init": "olora"},
    ],
    ids=str,
)
def test_from_training_to_a_merged_folder(
    untied_llama: Path,
    make_backbone: MakeBackbone,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    """A checkpoint holds all that the trained function is made of: it is resumed, and merged from the base's files."""
    module = make_backbone(untied_llama, adapter=options, lr=0.05)
    trainer = make_trainer(max_steps=3, limit_val_batches=0)
    trainer.fit(module, datamodule=make_data())
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        expected = module.model.eval()(tokens).logits
    held = torch.load(path, weights_only=True)["state_dict"]
    assert sum(t.numel() for t in held.values()) < 0.5 * sum(p.numel() for p in module.parameters())

    folder = merge_to_folder(str(untied_llama), read_adapter_checkpoint(path), tmp_path / "merged")
    with torch.no_grad():
        merged = LlamaForCausalLM.from_pretrained(folder)(tokens).logits
        pretrained = LlamaForCausalLM.from_pretrained(untied_llama)(tokens).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (expected - pretrained).abs().max() > 1e-2

    torch.manual_seed(5)  # what starts from random numbers must come from the checkpoint
    loaded = type(module).load_from_checkpoint(path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(tokens).logits, expected, rtol=1e-5, atol=1e-5)
