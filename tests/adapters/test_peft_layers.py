"""PEFT's files of every kind of layer and every method, both ways; magnitudes are perturbed, so that none is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_lightning import AdapterConfig, inject_adapters, load_peft_adapter, save_peft_adapter
from dora_lightning.adapters import adapter_layers
from tests.adapters.perturbed import assert_close, perturb, tiny_llama
from tests.adapters.zoo import KINDS, PLAIN

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (load|save) vera_A and vera_B:UserWarning"),
]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base(kind: str) -> nn.Module:
    """The layer beside another one, which no adapter touches."""
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": KINDS[kind].make(), "other": KINDS[kind].make()})


def ours(kind: str, **options: Any) -> nn.Module:
    model = base(kind)
    inject_adapters(model, AdapterConfig(**({"rank": 4, "target_modules": ["layer"]} | options)))
    torch.manual_seed(1)
    perturb(model)
    return model


def outputs(model: nn.Module, kind: str) -> Tensor:
    torch.manual_seed(2)
    x = KINDS[kind].inputs()
    with torch.no_grad():
        return model.get_submodule("layer")(x)


def loaded_by_peft(kind: str, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base(kind), str(folder)).base_model.model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


WRITTEN: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"method": method}) for kind in PLAIN for method in ("lora", "dora", "dvora")),
    *((kind, {"method": "magnitude", "rank": 16}) for kind in [*PLAIN, "conv2d groups", "conv2d depthwise"]),
    *((kind, {"method": "vera"}) for kind in ("Linear", "Conv1D")),
    *((kind, {"method": "lora"}) for kind in ("conv2d groups", "conv2d depthwise")),
    *((kind, {"init": init, "use_rslora": True}) for kind in PLAIN for init in ("pissa", "pissa_niter_2", "olora")),
    ("Linear", {"method": "lora", "init": "pissa"}),
]


@pytest.mark.parametrize(("kind", "options"), WRITTEN, ids=str)
def test_we_write_peft_loads(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = ours(kind, **options)
    expected = outputs(model, kind)
    assert (expected - outputs(base(kind), kind)).abs().max() > 1e-2
    save_peft_adapter(model, tmp_path)
    assert_close(outputs(loaded_by_peft(kind, tmp_path), kind), expected, 2e-5)
    # what PEFT reads, we read too
    assert_close(outputs(load_peft_adapter(base(kind), tmp_path), kind), expected, 2e-5)


@pytest.mark.parametrize(
    ("kind", "options"), [case for case in WRITTEN if "init" not in case[1] and case[1]["method"] != "dvora"], ids=str
)
def test_round_trip(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = ours(kind, **options)
    save_peft_adapter(model, tmp_path)
    loaded = load_peft_adapter(base(kind), tmp_path)
    before, after = tensors_of(model), tensors_of(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    into = ours(kind, **options)
    perturb(into)
    load_peft_adapter(into, tmp_path)
    assert torch.equal(outputs(into, kind), outputs(model, kind))
    save_peft_adapter(loaded, tmp_path / "again")
    for name in (TENSORS, CONFIG):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# the kind of layer, PEFT's config and its options
READ: list[tuple[str, type[peft.PeftConfig], dict[str, Any]]] = [
    *(
        (kind, peft.LoraConfig, {"r": 4, "use_dora": dora, "use_rslora": True})
        for kind in PLAIN
        for dora in (False, True)
    ),
    *((kind, peft.VeraConfig, {"r": 8, "projection_prng_key": 5, "d_initial": 0.2}) for kind in ("Linear", "Conv1D")),
    ("Linear", peft.VeraConfig, {"r": 8, "save_projection": False}),
    *(
        (kind, peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_dora": dora, "init_lora_weights": init})
        for kind, init in (("Linear", "pissa"), ("Linear", "olora"), ("Conv1D", "pissa"))
        for dora in (False, True)
    ),
]


@pytest.mark.parametrize(("kind", "config", "options"), READ, ids=str)
def test_peft_writes_we_load(kind: str, config: type[peft.PeftConfig], options: dict[str, Any], tmp_path: Path) -> None:
    model = peft.get_peft_model(base(kind), config(target_modules=["layer"], **options))
    torch.manual_seed(1)
    perturb(model)
    expected = outputs(model.base_model.model, kind)
    model.save_pretrained(tmp_path)
    loaded = load_peft_adapter(base(kind), tmp_path)
    assert_close(outputs(loaded, kind), expected, 2e-5)
    assert (expected - outputs(base(kind), kind)).abs().max() > 1e-2
    assert len(tensors_of(loaded)) == len(
        [key for key in load_file(tmp_path / TENSORS) if not key.startswith("base_model.vera_")]
    )


def test_the_derived_config_of_vera(tmp_path: Path) -> None:
    model = ours("Linear", method="vera", projection_seed=3, d_initial=0.25, dropout=0.1)
    save_peft_adapter(model, tmp_path)
    assert load_peft_adapter(base("Linear"), tmp_path).adapter_config == model.adapter_config


def test_vera_without_its_pair(tmp_path: Path) -> None:
    model = ours("Linear", method="vera")
    save_peft_adapter(model, tmp_path, save_projection=False)
    assert load_file(tmp_path / TENSORS).keys() == {
        "base_model.model.layer.vera_lambda_d",
        "base_model.model.layer.vera_lambda_b",
    }
    assert_close(outputs(loaded_by_peft("Linear", tmp_path), "Linear"), outputs(model, "Linear"), 1e-5)
    assert torch.equal(outputs(load_peft_adapter(base("Linear"), tmp_path), "Linear"), outputs(model, "Linear"))
    with pytest.raises(ValueError, match=r"save_projection=False has no effect without method='vera'"):
        save_peft_adapter(ours("Linear"), tmp_path, save_projection=False)


def test_a_pair_that_is_not_the_seed_s(tmp_path: Path) -> None:
    save_peft_adapter(ours("Linear", method="vera"), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["base_model.vera_B"].mul_(2))
    model = base("Linear")
    with pytest.raises(ValueError, match=r"vera_B in the file is not what projection_prng_key=0 gives here"):
        load_peft_adapter(model, tmp_path)
    assert not list(adapter_layers(model))


def test_vera_into_another_seed(tmp_path: Path) -> None:
    save_peft_adapter(ours("Linear", method="vera"), tmp_path)
    with pytest.raises(ValueError, match="projection_seed of layer is 0 in the file, 1 in the model"):
        load_peft_adapter(ours("Linear", method="vera", projection_seed=1), tmp_path)


def test_pissa_is_converted_as_peft_converts_it(tmp_path: Path) -> None:
    model = ours("Linear", init="pissa", alpha=6.0)
    save_peft_adapter(model, tmp_path)
    options = json.loads((tmp_path / CONFIG).read_text())
    assert (options["r"], options["lora_alpha"], options["init_lora_weights"]) == (8, 12, True)
    layer, written = model.get_submodule("layer"), load_file(tmp_path / TENSORS)
    A, B = written["base_model.model.layer.lora_A.weight"], written["base_model.model.layer.lora_B.weight"]
    assert torch.equal(A, torch.cat([layer.lora_A, layer.init_A]))
    assert torch.equal(B, torch.cat([layer.lora_B, -layer.init_B], dim=1))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_whole_model_with_an_embedding_whose_weight_peft_writes_too(method: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], use_dora=method == "dora")
    model = peft.get_peft_model(tiny_llama(), config)
    perturb(model)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / TENSORS)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert_close(load_peft_adapter(tiny_llama(), tmp_path)(ids).logits, model(ids).logits, 1e-5)
    rewrite(tmp_path, lambda tensors: tensors[key].add_(1))
    with pytest.raises(
        ValueError, match=f"unexpected tensors: {key}; known are those of adapters, and the model's own"
    ):
        load_peft_adapter(tiny_llama(), tmp_path)


# Other spellings -----------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], what: str = TENSORS) -> None:
    if what == TENSORS:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        return
    options = json.loads((folder / what).read_text())
    change(options)
    (folder / what).write_text(json.dumps(options))


@pytest.mark.parametrize(
    "spelling",
    ["magnitude", "magnitude.weight", "lora_magnitude", "lora_magnitude.weight", "lora_magnitude.default.weight"],
)
@pytest.mark.parametrize("silent", [False, True])
def test_torchtune_and_nemo(spelling: str, silent: bool, tmp_path: Path) -> None:
    model, fresh = ours("Linear"), base("Linear")
    with torch.no_grad():
        for each in (model, fresh):
            each.get_submodule("layer").bias.zero_()  # which torchtune scales, and NeMo does not
    save_peft_adapter(model, tmp_path)
    prefix = "base_model.model.layer."
    rewrite(
        tmp_path, lambda tensors: tensors.update({prefix + spelling: tensors.pop(prefix + "lora_magnitude_vector")})
    )
    if silent:  # torchtune's config says nothing of DoRA
        rewrite(tmp_path, lambda options: options.pop("use_dora"), CONFIG)
    assert torch.equal(outputs(load_peft_adapter(fresh, tmp_path), "Linear"), outputs(model, "Linear"))


def test_torchtune_scales_the_bias(tmp_path: Path) -> None:
    """``y = g (W x + s B A x + bias)`` there: another function, unless the bias is zero."""
    model = ours("Linear")
    layer: Any = model.get_submodule("layer")
    x = KINDS["Linear"].inputs()
    theirs = layer.gain() * (x @ (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).T + layer.bias)
    assert not torch.allclose(theirs, layer(x), atol=1e-3)
    save_peft_adapter(model, tmp_path)
    prefix = "base_model.model.layer."
    rewrite(
        tmp_path, lambda tensors: tensors.update({prefix + "magnitude": tensors.pop(prefix + "lora_magnitude_vector")})
    )
    fresh = base("Linear")
    with pytest.raises(ValueError, match=r"layer has a bias, .* torchtune's .* scales the bias"):
        load_peft_adapter(fresh, tmp_path)
    assert not any(True for _ in adapter_layers(fresh))


def test_a_silent_config_without_magnitudes_is_lora(tmp_path: Path) -> None:
    model = ours("Linear", method="lora")
    save_peft_adapter(model, tmp_path)
    rewrite(tmp_path, lambda options: options.pop("use_dora"), CONFIG)
    assert load_peft_adapter(base("Linear"), tmp_path).adapter_config.method == "lora"


@pytest.mark.parametrize("spelling", ["weight_m_wdecomp.weight", "weight_m_wdecomp.default.weight"])
@pytest.mark.parametrize("simple", [True, False])
def test_the_official_code_s_files(spelling: str, simple: bool, tmp_path: Path) -> None:
    model = base("Linear")
    config = AdapterConfig(rank=4, target_modules=["layer"], magnitude_only_modules=["other"])
    inject_adapters(model, config)
    torch.manual_seed(1)
    perturb(model)
    save_peft_adapter(model, tmp_path)

    def officially(tensors: dict[str, Tensor]) -> None:
        for module in ("layer", "other"):
            magnitude = tensors.pop(f"base_model.model.{module}.lora_magnitude_vector")
            tensors[f"base_model.model.{module}.{spelling}"] = magnitude[:, None].clone()  # [out, 1]
        for part in ("A", "B"):
            del tensors[f"base_model.model.other.lora_{part}.weight"]

    rewrite(tmp_path, officially)
    options = {"peft_type": "DORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "dora_simple": simple}
    options |= {"target_modules": ["layer"], "Wdecompose_target_modules": ["other"], "enable_lora": None}
    (tmp_path / CONFIG).write_text(json.dumps(options))
    loaded = load_peft_adapter(base("Linear"), tmp_path)
    assert torch.equal(outputs(loaded.eval(), "Linear"), outputs(model, "Linear"))
    assert torch.equal(loaded.get_submodule("other").magnitude, model.get_submodule("other").magnitude)
    found = loaded.adapter_config
    assert (found.method, found.dropout, found.exact_dropout, found.detach_norm) == ("dora", 0.05, True, simple)
    assert found.magnitude_only_modules == ["other"]


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("conv2d groups", {"method": "dora"}, "layer: PEFT takes DoRA's norm of a convolution with groups"),
        (
            "conv2d dilated, reflecting",
            {"method": "lora"},
            "layer: PEFT's update of a convolution ignores its dilation",
        ),
        ("conv2d", {"method": "vera"}, "layer: PEFT has VeRA for linear layers alone, not for a Conv2d"),
        ("Linear", {"method": "full", "rank": 16}, "method='full' trains the model's own weights"),
        ("Linear", {"method": "vera", "magnitude_only_modules": ["other"]}, "PEFT has one use_dora .* method='vera'"),
    ],
)
def test_what_is_not_written(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_peft_adapter(ours(kind, **options), tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_padding_that_peft_does_not_know(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")})
    inject_adapters(model, AdapterConfig(rank=4, target_modules=["layer"]))
    with pytest.raises(ValueError, match="layer: PEFT's update of a convolution ignores padding_mode='circular'"):
        save_peft_adapter(model, tmp_path)


def test_an_update_that_mixes_groups_is_not_read(tmp_path: Path) -> None:
    model = peft.get_peft_model(base("conv2d groups"), peft.LoraConfig(r=4, target_modules=["layer"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer: lora_A mixes the channels of the convolution's groups"):
        load_peft_adapter(base("conv2d groups"), tmp_path)


def test_tensors_of_another_kind_of_layer(tmp_path: Path) -> None:
    save_peft_adapter(ours("Embedding"), tmp_path)
    with pytest.raises(ValueError, match="the file holds lora_embedding_A of layer, a Linear"):
        load_peft_adapter(base("Linear"), tmp_path)
    save_peft_adapter(ours("conv2d"), tmp_path)
    with pytest.raises(ValueError, match=r"layer\.lora_A has shape \(4, 4, 3, 3\), expected \(4, 12, 1, 1\)"):
        load_peft_adapter(base("conv2d 1x1"), tmp_path)
    # one magnitude per token, as others have it, is another format
    save_peft_adapter(ours("Embedding"), tmp_path)
    key = "base_model.model.layer.lora_magnitude_vector"
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.ones(20)}))
    with pytest.raises(ValueError, match=r"layer\.magnitude has shape \(20,\), expected \(10,\)"):
        load_peft_adapter(base("Embedding"), tmp_path)
