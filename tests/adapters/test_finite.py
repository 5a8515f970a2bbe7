"""NaN is not merged, written, analyzed: each by name, and nothing is left half done."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dora_lightning import AdapterConfig, inject_adapters, merge_adapters, save_peft_adapter
from dora_lightning.adapters import adapter_layers
from dora_lightning.adapters.analysis import layer_change
from dora_lightning.adapters.finite import NonFiniteError, check_finite, nonfinite_names
from dora_lightning.analyzing.records import make_record, read_records


def make_model(method: str = "dora") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    inject_adapters(model, AdapterConfig(method, **({} if method == "magnitude" else {"rank": 2})))
    return model


def spoil(model: nn.Module, part: str, value: float = math.nan) -> None:
    with torch.no_grad():
        dict(model.named_parameters())[part].view(-1)[-1] = value


def test_names() -> None:
    tensors = {
        "whole": torch.tensor([1, 2]),
        "nan": torch.tensor([0.0, math.nan]).half(),
        "fine": torch.tensor([3e38]),
        "infinite": torch.tensor([-math.inf]).bfloat16(),
        "empty": torch.zeros(0),
        "float8": torch.tensor([math.nan]).to(torch.float8_e4m3fn),
    }
    assert nonfinite_names(tensors) == ["nan", "infinite", "float8"]
    with pytest.raises(NonFiniteError, match=r"it is not done: nan \(and 2 more\) holds NaN or infinity"):
        check_finite(tensors, "it is not done")
    check_finite({}, "nothing")


@pytest.mark.parametrize(("method", "part"), [("dora", "1.magnitude"), ("lora", "0.lora_B"), ("dora", "0.lora_A")])
def test_merging_in_memory_changes_nothing(method: str, part: str) -> None:
    model = make_model(method)
    weights = [layer.weight.clone() for _, layer in adapter_layers(model)]
    spoil(model, part)
    with pytest.raises(NonFiniteError, match=f"nothing is merged: {part} holds NaN"):
        merge_adapters(model)
    assert all(torch.equal(layer.weight, old) for (_, layer), old in zip(adapter_layers(model), weights, strict=True))


def test_no_peft_file(tmp_path: Path) -> None:
    model = make_model()
    spoil(model, "0.lora_A", math.inf)
    with pytest.raises(NonFiniteError, match=r"adapter is not written: base_model\.model\.0\.lora_A\.weight holds NaN"):
        save_peft_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "part"),
    # with a magnitude, rows whose direction is NaN could be left out in silence
    [("dora", "0.lora_B"), ("dora", "0.magnitude"), ("lora", "0.lora_B"), ("magnitude", "0.magnitude")],
)
def test_no_pattern(method: str, part: str) -> None:
    model = make_model(method)
    spoil(model, part)
    change = layer_change(next(layer for _, layer in adapter_layers(model)))
    assert math.isnan(change.delta_m)
    assert math.isnan(change.delta_d)
    with pytest.raises(NonFiniteError, match=r"^0 at step 7: the change of magnitude is nan"):
        make_record(7, "0", method, change)


def test_a_file_of_patterns_with_nan(tmp_path: Path) -> None:
    path = tmp_path / "learning_pattern.jsonl"
    row = '{"step": 1, "module": "0", "type": "0", "layer": 0, "method": "dora", "delta_m": NaN, "delta_d": 0.1}\n'
    path.write_text(row)
    with pytest.raises(ValueError, match=r"learning_pattern\.jsonl, line 1: .*NaN"):
        read_records(path)
