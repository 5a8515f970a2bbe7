"""What is planned of activations, against what autograd keeps of real steps and what lives at once in them."""

from pathlib import Path
from typing import Any

import pytest
from plan_measured import Case, peak_bytes, saved_bytes
from tiny import MakeLlama

from dora_lightning.planning.activations import activations
from dora_lightning.planning.blocks import read_sizes

# others' libraries deprecate what they themselves call
pytestmark = pytest.mark.filterwarnings("ignore")

ALL: dict[str, Any] = {"rank": 4, "target_modules": "all-linear"}
SOME: dict[str, Any] = {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
HALF: dict[str, Any] = {
    "rank": 4,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
    "magnitude_only_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def llama(make_llama: MakeLlama) -> Path:
    return make_llama(num_hidden_layers=3, tied=False)


def planned_bytes(case: Case) -> int:
    counted = activations(read_sizes(case.planned()), case.step())
    return counted.saved + counted.logits


# Exactly what autograd keeps, but for a few numbers (the loss, a mask's last column).
@pytest.mark.parametrize(
    "options",
    [
        {"adapter": SOME},
        {"adapter": SOME, "dtype": "bfloat16"},
        {"adapter": SOME, "checkpointing": False, "rows": 1, "length": 33, "supervised": 5},
        {"adapter": ALL | {"dropout": 0.1}},
        {"adapter": ALL | {"dropout": 0.1}, "dtype": "bfloat16"},
        {"adapter": ALL | {"dropout": 0.1}, "autocast": True},
        {"adapter": SOME, "autocast": True},
        {"adapter": HALF},
        {"adapter": ALL | {"method": "lora"}},
        {"adapter": {"method": "magnitude"}},
        {"adapter": ALL | {"init": "pissa"}},
        {"adapter": {"method": "full", "target_modules": ["q_proj", "down_proj"]}},
        {"adapter": {"rank": 4, "target_modules": ["lm_head", "q_proj"]}},
    ],
)
def test_saved_exactly(llama: Path, options: dict[str, Any]) -> None:
    case = Case(llama, **options)
    assert planned_bytes(case) == pytest.approx(saved_bytes(case), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": SOME, "padding": 3, "dtype": "bfloat16"},
        {"adapter": ALL | {"dropout": 0.1, "exact_dropout": True}},
        {"adapter": ALL | {"dropout": 0.1, "exact_dropout": True}, "dtype": "bfloat16"},
        {"adapter": ALL | {"method": "vera"}, "dtype": "bfloat16"},
        {"adapter": ALL | {"method": "dvora", "dropout": 0.1}},
        {"adapter": ALL | {"norm_axis": "in"}, "dtype": "bfloat16"},
        {"adapter": ALL | {"norm_axis": "in"}, "autocast": True},
        {"adapter": {"rank": 4, "target_modules": ["embed_tokens", "q_proj"]}},
        {"adapter": {"rank": 4, "target_modules": r".*layers\.2\..*up_proj"}},
        {"adapter": SOME, "attention": "eager"},
        {"adapter": SOME, "attention": "eager", "dtype": "bfloat16", "padding": 3},
    ],
)
def test_saved_within_six_percent(llama: Path, options: dict[str, Any]) -> None:
    case = Case(llama, **options)
    assert planned_bytes(case) == pytest.approx(saved_bytes(case), rel=0.06)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_over_a_quantised_base(make_llama: MakeLlama, quantization: str, dropout: float) -> None:
    pytest.importorskip("bitsandbytes")
    folder = make_llama(hidden_size=64, intermediate_size=128, tied=False)
    case = Case(folder, ALL | {"dropout": dropout}, dtype="bfloat16", quantization=quantization)
    assert planned_bytes(case) == pytest.approx(saved_bytes(case), rel=0.06)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("hidden", "rows", "length"), [(64, 2, 96), (128, 1, 160), (256, 3, 64)])
def test_most_at_once(
    make_llama: MakeLlama, hidden: int, rows: int, length: int, checkpointing: bool, dropout: float, dtype: str
) -> None:
    folder = make_llama(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=4, num_attention_heads=8, tied=False
    )
    case = Case(folder, ALL | {"dropout": dropout}, dtype, rows, length, length // 2, checkpointing=checkpointing)
    counted = activations(read_sizes(case.planned()), case.step())
    assert counted.peak(checkpointing) == pytest.approx(peak_bytes(case), rel=0.15)


def test_most_at_once_is_of_the_logits(make_llama: MakeLlama) -> None:
    case = Case(make_llama(vocab_size=8000, tied=False), SOME, supervised=63)
    counted = activations(read_sizes(case.planned()), case.step())
    assert counted.logits_peak > 5 * counted.backward
    assert counted.peak(False) == pytest.approx(peak_bytes(case), rel=0.01)
