"""PEFT's files, with PEFT as the oracle: what it wrote we load, what we wrote it loads, and nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dora_lightning import (
    AdapterConfig,
    inject_adapters,
    load_peft_adapter,
    merge_adapters,
    save_peft_adapter,
)
from dora_lightning.adapters import adapter_layers, peft_writing
from tests.adapters.perturbed import perturb

TARGETS = ["q_proj", "v_proj", "down_proj"]
# peft 0.21 under transformers 5
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning"
    ),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of:UserWarning"),
]
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA whose q, k, v and o have biases, and they are not zero."""
    folder = save_llama(tmp_path_factory.mktemp("base"), attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def load(base: Path) -> Callable[[], PreTrainedModel]:
    return lambda: AutoModelForCausalLM.from_pretrained(base).eval()


Load = Callable[[], PreTrainedModel]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 27).reshape(2, 12)).logits


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def peft_adapter(model: PreTrainedModel, folder: Path, **options: Any) -> Tensor:
    """A perturbed adapter of PEFT's in ``folder``; what it gives."""
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "use_dora": True}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**(defaults | options)))
    plain = logits(adapted)
    torch.manual_seed(2)
    perturb(adapted)
    adapted.save_pretrained(folder)
    perturbed = logits(adapted)
    assert (perturbed - plain).abs().max() > 0.1
    return perturbed


def our_adapter(model: nn.Module, **options: Any) -> nn.Module:
    inject_adapters(model, AdapterConfig(**({"rank": 4, "alpha": 6.0, "target_modules": TARGETS} | options)))
    torch.manual_seed(2)
    perturb(model)
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], what: str = "tensors") -> None:
    """Change the tensors or the options of an adapter on disk."""
    if what == "tensors":
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        options = json.loads((folder / "adapter_config.json").read_text())
        change(options)
        (folder / "adapter_config.json").write_text(json.dumps(options))


# Written by PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": False},
        {"use_rslora": True},
        {"use_dora": False, "use_rslora": True},
        {"target_modules": r".*\.1\..*(k|gate)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        {"target_modules": TARGETS, "layers_to_transform": [1]},
        {"rank_pattern": {"q_proj|v_proj|down_proj": 2}, "alpha_pattern": {r".*\.layers\..*": 3}},
        {"rank_pattern": {"v_proj": 2, "k_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        {"rank_pattern": {"^model.layers.0.self_attn.v_proj": 2}, "use_rslora": True},
        {"lora_dropout": 0.25, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_peft_writes_we_load(load: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = peft_adapter(load(), tmp_path, **options)
    model = load()
    assert load_peft_adapter(model, tmp_path) is model
    assert_same_logits(logits(model), expected)
    written = load_file(tmp_path / "adapter_model.safetensors")
    held = adapter_tensors(model)
    assert len(held) == len(written)
    for name, value in held.items():
        module, _, part = name.rpartition(".")
        key = {"magnitude": "lora_magnitude_vector"}.get(part, f"{part}.weight")
        assert torch.equal(value, written[f"base_model.model.{module}.{key}"]), name


def test_the_derived_config(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path, lora_dropout=0.25)
    model = load_peft_adapter(load(), tmp_path)
    config = model.adapter_config
    assert sorted(config.target_modules) == sorted(TARGETS)
    # PEFT drops the input of the base path too
    assert (config.method, config.rank, config.alpha, config.dropout, config.exact_dropout) == (
        "dora",
        4,
        6.0,
        0.25,
        True,
    )
    peft_adapter(load(), tmp_path, use_dora=False, use_rslora=True, lora_dropout=0.25)
    config = load_peft_adapter(load(), tmp_path).adapter_config
    assert (config.method, config.alpha, config.dropout, config.exact_dropout) == ("lora", 6.0, 0.25, False)
    assert config.use_rslora
    assert config.scaling == 3.0


def test_modules_are_exactly_those_of_the_file(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path)
    rewrite(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.0" in key])
    model = load_peft_adapter(load(), tmp_path)
    names = {f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}
    assert {name for name, _ in adapter_layers(model)} == names


def test_a_name_that_is_the_end_of_another(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"head": nn.Linear(4, 3), "inner": nn.ModuleDict({"head": nn.Linear(4, 3)})})

    model = our_adapter(make(), target_modules=r"head", rank=2)
    save_peft_adapter(model, tmp_path / "a")
    loaded = load_peft_adapter(make(), tmp_path / "a")
    assert [name for name, _ in adapter_layers(loaded)] == ["head"]
    twin = peft.PeftModel.from_pretrained(make(), str(tmp_path / "a"))
    assert isinstance(twin.base_model.model["inner"]["head"], nn.Linear)


@pytest.mark.parametrize(
    "spelling", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"]
)
def test_spellings_of_the_magnitude(load: Load, tmp_path: Path, spelling: str) -> None:
    expected = peft_adapter(load(), tmp_path)

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("lora_magnitude_vector")]:
            tensors[key.replace("lora_magnitude_vector", spelling)] = tensors.pop(key)

    rewrite(tmp_path, rename)
    assert_same_logits(logits(load_peft_adapter(load(), tmp_path)), expected)


def test_half_precision_tensors(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({key: t.bfloat16() for key, t in tensors.items()}))
    model = load_peft_adapter(load(), tmp_path)
    magnitude = dict(adapter_layers(model))[Q0].magnitude
    written = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{Q0}.lora_magnitude_vector"]
    assert magnitude.dtype == torch.float32
    assert torch.equal(magnitude, written.float())


# Written by us -------------------------------------------------------------------------------------------------------

OURS: list[dict[str, Any]] = [
    {},
    {"method": "lora"},
    {"target_modules": "all-linear", "dropout": 0.1},
    {"magnitude_only_modules": ["o_proj", "v_proj"]},
    {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5.0}, "use_rslora": True},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"method": "magnitude", "rank": 16, "alpha": None},
]


@pytest.mark.parametrize("options", OURS, ids=str)
def test_we_write_peft_loads(load: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    model = our_adapter(load(), **options)
    expected = logits(model)
    assert (expected - logits(load())).abs().max() > 0.1
    assert save_peft_adapter(model, tmp_path / "adapter") == tmp_path / "adapter"
    loaded = peft.PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    assert_same_logits(logits(loaded), expected)
    assert type(loaded).__name__ == "PeftModelForCausalLM"


@pytest.mark.parametrize("options", OURS, ids=str)
def test_round_trip(load: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    model = our_adapter(load(), **options)
    save_peft_adapter(model, tmp_path / "adapter")
    loaded = load_peft_adapter(load(), tmp_path / "adapter")
    before, after = adapter_tensors(model), adapter_tensors(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {n: layer.method for n, layer in adapter_layers(model)} == {
        n: layer.method for n, layer in adapter_layers(loaded)
    }
    assert torch.equal(logits(model), logits(loaded))
    save_peft_adapter(loaded, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_magnitude_alone_trains_alone_in_peft_too(load: Load, tmp_path: Path) -> None:
    save_peft_adapter(our_adapter(load(), magnitude_only_modules=["o_proj"]), tmp_path / "adapter")
    twin = peft.PeftModel.from_pretrained(load(), str(tmp_path / "adapter"), is_trainable=True)
    twin(torch.arange(3, 27).reshape(2, 12)).logits.logsumexp(-1).sum().backward()
    gradients = {
        name: bool(p.grad.any()) for name, p in twin.named_parameters() if p.requires_grad and "o_proj" in name
    }
    assert len(gradients) == 6
    assert all(moves == ("magnitude" in name) for name, moves in gradients.items()), gradients


def test_the_files(load: Load, base: Path, tmp_path: Path) -> None:
    model = our_adapter(load(), magnitude_only_modules=["model.layers.0.self_attn.o_proj"], dropout=0.1)
    folder = save_peft_adapter(model, tmp_path / "new" / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "use_dora": True,
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "target_modules": [name for name, _ in adapter_layers(model)],
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.o_proj": 1},
        "alpha_pattern": {r"^model\.layers\.0\.self_attn\.o_proj": 1},
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        o_proj = "base_model.model.model.layers.0.self_attn.o_proj"
        assert file.get_tensor(f"{o_proj}.lora_A.weight").shape == (1, 32)
        assert not file.get_tensor(f"{o_proj}.lora_B.weight").any()


def test_an_existing_folder_is_written_anew(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_peft_adapter(our_adapter(load(), method="lora"), folder)
    (folder / "README.md").write_text("notes")
    model = our_adapter(load())
    save_peft_adapter(model, folder)
    assert torch.equal(logits(load_peft_adapter(load(), folder)), logits(model))
    assert (folder / "README.md").read_text() == "notes"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failed_write_leaves_the_old_files(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_peft_adapter(our_adapter(load(), method="lora"), tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(peft_writing, "save", full)
    for target in (folder, tmp_path / "other"):
        with pytest.raises(OSError, match="No space left"):
            save_peft_adapter(our_adapter(load()), target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merged_adapters_are_written_as_they_are(load: Load, tmp_path: Path) -> None:
    model = our_adapter(load())
    expected = logits(model)
    save_peft_adapter(merge_adapters(model), tmp_path / "adapter")
    assert_same_logits(logits(load_peft_adapter(load(), tmp_path / "adapter")), expected)


def test_names_are_relative_to_the_adapted_model(load: Load, tmp_path: Path) -> None:
    inner = our_adapter(load())
    save_peft_adapter(nn.ModuleDict({"model": inner}), tmp_path / "outer")
    assert torch.equal(logits(load_peft_adapter(load(), tmp_path / "outer")), logits(inner))
    # the whole was adapted: a part of it can be written for PEFT
    whole = our_adapter(nn.ModuleDict({"model": load()}))
    save_peft_adapter(whole["model"], tmp_path / "part")
    assert torch.equal(logits(load_peft_adapter(load(), tmp_path / "part")), logits(whole["model"]))


# Into a model with adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OURS, ids=str)
def test_into_adapters_that_fit(load: Load, tmp_path: Path, options: dict[str, Any]) -> None:
    model = our_adapter(load(), **options)
    save_peft_adapter(model, tmp_path / "adapter")
    other = load()
    inject_adapters(other, model.adapter_config)
    logits(other)  # norms are cached
    load_peft_adapter(nn.ModuleDict({"inner": other}), tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    assert other.adapter_config == model.adapter_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, r"rank of model\.layers\.0\.mlp\.down_proj is 4 in the file, 8 in the model"),
        ({"alpha": 8.0}, r"scaling of .*down_proj is 1\.5 in the file, 2\.0 in the model"),
        ({"method": "lora"}, r"method of .*down_proj is dora in the file, lora in the model"),
        ({"magnitude_only_modules": ["v_proj"]}, r"method of .*v_proj is dora in the file, magnitude in the model"),
        ({"target_modules": ["q_proj"]}, r"holds tensors for .*down_proj.*, where the model has no adapters"),
        ({"target_modules": "all-linear"}, r"lacks tensors for .*gate_proj.* more, where the model has adapters"),
        ({"norm_axis": "in"}, r"norm_axis='in' \(model\.layers.*\) has no equivalent in PEFT"),
    ],
    ids=str,
)
def test_into_adapters_that_do_not_fit(load: Load, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    peft_adapter(load(), tmp_path)
    model = our_adapter(load(), **options)
    before = adapter_tensors(model)
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(model, tmp_path)
    after = adapter_tensors(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_direction_fits_a_dora_adapter_of_its_rank(load: Load, tmp_path: Path) -> None:
    magnitudes = our_adapter(load(), **OURS[-1])
    save_peft_adapter(magnitudes, tmp_path / "adapter")
    model = our_adapter(load(), rank=1, alpha=1.0)
    load_peft_adapter(model, tmp_path / "adapter")
    assert not any(layer.lora_A.any() or layer.lora_B.any() for _, layer in adapter_layers(model))
    assert_same_logits(logits(model), logits(magnitudes))


def test_into_merged_adapters(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path)
    with pytest.raises(ValueError, match=r"is merged; call unmerge_adapters\(model\) first"):
        load_peft_adapter(merge_adapters(our_adapter(load())), tmp_path)


# Refused -------------------------------------------------------------------------------------------------------------


def assert_refused(model: nn.Module, folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    """The error comes, names the folder, and leaves the model as it was."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=message) as caught:
        load_peft_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not hasattr(model, "adapter_config")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "OFT"),
        ("peft_type", "VERA"),  # with tensors of DoRA
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["w"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("r", "4"),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "8"}),
        ("lora_alpha", None),
    ],
)
def test_options_that_cannot_be_represented(load: Load, tmp_path: Path, option: str, value: object) -> None:
    peft_adapter(load(), tmp_path)
    rewrite(tmp_path, lambda options: options.update({option: value}), "options")
    assert_refused(load(), tmp_path, "unexpected tensors" if value == "VERA" else rf"{option}\b")


def test_values_out_of_range(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path)
    for option, value in (("r", 0), ("lora_alpha", -1), ("rank_pattern", {"q_proj": 0})):
        rewrite(tmp_path, lambda options, change={option: value}: options.update(change), "options")
        assert_refused(load(), tmp_path, "r must be a whole number of at least 1 and lora_alpha above 0")
    rewrite(tmp_path, lambda options: options.update(r=4, lora_alpha=6, rank_pattern={"(": 1}), "options")
    assert_refused(load(), tmp_path, "rank_pattern or alpha_pattern: missing")


def test_magnitudes_alone_have_no_dropout(load: Load, tmp_path: Path) -> None:
    folder = save_peft_adapter(our_adapter(load(), **OURS[-1]), tmp_path / "adapter")
    rewrite(folder, lambda options: options.update(lora_dropout=0.1), "options")
    assert_refused(load(), folder, r"lora_dropout=0\.1")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"base_model.model.{Q0}.lora_magnitude_vector", rf"lacks tensors: {Q0}\.magnitude"),
        (f"base_model.model.{Q0}.lora_B.weight", rf"lacks tensors: {Q0}\.lora_B"),
    ],
)
def test_missing_tensors(load: Load, tmp_path: Path, key: str, message: str) -> None:
    peft_adapter(load(), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(key))
    assert_refused(load(), tmp_path, message)


@pytest.mark.parametrize(
    "key",
    [
        f"{Q0}.lora_A.weight",
        f"base_model.model.{Q0}.lora_C.weight",
        "base_model.model.lm_head.weight",
    ],
)
def test_unexpected_tensors(load: Load, tmp_path: Path, key: str) -> None:
    peft_adapter(load(), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.zeros(4, 32)}))
    assert_refused(load(), tmp_path, f"unexpected tensors: {key}; known are")


def test_magnitudes_without_use_dora(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path)
    rewrite(tmp_path, lambda options: options.update(use_dora=False), "options")
    assert_refused(load(), tmp_path, r"unexpected tensors: .*lora_magnitude_vector and 1 more.*use_dora is false")


def test_the_same_tensor_twice(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path)
    key = f"base_model.model.{Q0}.lora_magnitude_vector.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.ones(32)}))
    assert_refused(load(), tmp_path, f"holds magnitude of {Q0} twice")


def test_shapes_and_dtypes(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path)
    for part, value, message in [
        ("lora_A.weight", torch.zeros(3, 32), r"q_proj\.lora_A has shape \(3, 32\), expected \(4, 32\)"),
        ("lora_B.weight", torch.zeros(32, 5), r"q_proj\.lora_B has shape \(32, 5\), expected \(32, 4\)"),
        ("lora_magnitude_vector", torch.zeros(1, 32), r"q_proj\.magnitude has shape \(1, 32\), expected \(32,\)"),
        (
            "lora_magnitude_vector",
            torch.ones(32).double(),
            r"q_proj\.magnitude is torch\.float64, which torch\.float32",
        ),
    ]:
        key = f"base_model.model.{Q0}.{part}"
        kept = load_file(tmp_path / "adapter_model.safetensors")[key]
        rewrite(tmp_path, lambda tensors, key=key, value=value: tensors.update({key: value}))
        assert_refused(load(), tmp_path, message)
        rewrite(tmp_path, lambda tensors, key=key, kept=kept: tensors.update({key: kept}))


def test_modules_that_are_not_there_or_not_linear(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path)
    assert_refused(
        nn.ModuleDict({"model": load()}), tmp_path, r"no modules .*q_proj.*its linear modules are model\.model"
    )

    def move(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if Q0 in key]:
            tensors[key.replace(Q0, "model.norm")] = tensors.pop(key)

    rewrite(tmp_path, move)
    assert_refused(load(), tmp_path, r"only linear layers, convolutions and .*model\.norm, a LlamaRMSNorm")


def test_a_base_without_values(load: Load, tmp_path: Path) -> None:
    peft_adapter(load(), tmp_path)
    assert_refused(load().to("meta"), tmp_path, "is on the meta device")


def test_folders_that_hold_no_adapter(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    assert_refused(load(), folder, "it has no adapter_config.json", FileNotFoundError)
    peft_adapter(load(), folder)
    tensors = folder / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:100])
    assert_refused(load(), folder, "could not be read as safetensors")
    save_file({}, tensors)
    assert_refused(load(), folder, "holds no tensors")
    tensors.unlink()
    assert_refused(load(), folder, "it has no adapter_model.safetensors", FileNotFoundError)
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    assert_refused(load(), folder, "adapter_model.bin, a pickle, which is never read")
    for text, message in (("{", "adapter_config.json: broken JSON"), ("[]", "must hold an object, got a list")):
        (folder / "adapter_config.json").write_text(text)
        assert_refused(load(), folder, message)


def test_what_peft_has_no_word_for_is_not_written(load: Load, tmp_path: Path) -> None:
    for model, message in [
        (load(), "the model has no adapters"),
        (our_adapter(load(), norm_axis="in"), r"norm_axis='in' \(.*q_proj\) has no equivalent in PEFT"),
        (our_adapter(load(), method="lora", magnitude_only_modules=["o_proj"]), "one use_dora for all modules"),
        (our_adapter(load()).to("meta"), "is on the meta device"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_peft_adapter(model, tmp_path / "adapter")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; name a folder"):
        save_peft_adapter(our_adapter(load()), tmp_path / "file")
