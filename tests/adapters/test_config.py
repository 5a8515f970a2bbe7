"""Every value is checked, and an option that would be ignored is an error."""

from __future__ import annotations

import json

import pytest

from dora_lightning.adapters import AdapterConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dorra"}, "method must be one of dora, lora, vera, dvora, magnitude, full, got 'dorra'"),
        ({"rank": 0}, "rank must be at least 1, found 0"),
        ({"rank": -4}, "rank must be"),
        ({"rank": True}, "rank must be a whole number of at least 1, found True"),
        ({"alpha": 0.0}, "alpha must be a number greater than 0"),
        ({"alpha": -1.0}, "alpha must be a number greater than 0"),
        ({"alpha": float("nan")}, "alpha must be a number greater than 0"),
        ({"dropout": 1.0}, r"dropout must be a number of at least 0 and below 1, found 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"norm_axis": "rows"}, "norm_axis must be 'out' or 'in', got 'rows'"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": ["q_proj", ""]}, "target_modules must be a string or a list of module names"),
        ({"target_modules": "q_proj("}, r"target_modules: 'q_proj\(' is not a regular expression"),
        ({"magnitude_only_modules": "["}, "magnitude_only_modules: .* is not a regular expression"),
        ({"method": "lora", "detach_norm": False}, "detach_norm=False has no effect with method='lora'"),
        ({"method": "lora", "exact_dropout": True}, "exact_dropout=True has no effect with method='lora'"),
        ({"method": "lora", "norm_axis": "in"}, "norm_axis='in' has no effect with method='lora'"),
        ({"method": "magnitude", "dropout": 0.1}, "dropout=0.1 has no effect with method='magnitude'"),
        ({"method": "magnitude", "rank": 8}, "rank=8 has no effect with method='magnitude'"),
        ({"method": "magnitude", "alpha": 8.0}, "alpha=8.0 has no effect with method='magnitude'"),
        ({"method": "full", "rank": 8}, "rank=8 has no effect with method='full'"),
        ({"method": "vera", "alpha": 8.0}, "alpha=8.0 has no effect with method='vera'"),
        ({"method": "dvora", "init": "pissa"}, "init='pissa' has no effect with method='dvora'"),
        ({"method": "vera", "rank_pattern": {"q_proj": 4}}, "rank_pattern=.* has no effect with method='vera'"),
        ({"method": "vera", "norm_axis": "in"}, "norm_axis='in' has no effect with method='vera'"),
        ({"d_initial": 0.2}, "d_initial=0.2 has no effect with method='dora'"),
        ({"projection_seed": 1}, "projection_seed=1 has no effect with method='dora'"),
        ({"init": "pisa"}, "init must be one of kaiming, gaussian, orthogonal, pissa, pissa_niter_<steps>, olora, got"),
        ({"init": "pissa_niter_"}, "init must be one of"),
        ({"init": "orthogonal", "rank": 3}, "init='orthogonal' needs an even rank"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj must be at least 1, found 0"),
        ({"alpha_pattern": {"q_proj": 0.0}}, "alpha_pattern: q_proj must be a number greater than 0, found 0.0"),
        ({"alpha_pattern": {"(": 1.0}}, r"alpha_pattern: '\(' is not a regular expression"),
        ({"exact_dropout": True, "norm_axis": "in"}, "exact_dropout is defined for norm_axis='out' only"),
    ],
)
def test_a_bad_value_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**options)


def test_scaling() -> None:
    assert AdapterConfig(rank=16).scaling == 2
    assert AdapterConfig(rank=16, alpha=8.0).scaling == 0.5


def test_scaling_by_pattern() -> None:
    config = AdapterConfig(rank=16, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.0\..*": 6.0})
    assert (config.rank_of("layers.1.q_proj"), config.rank_of("layers.1.v_proj")) == (4, 16)
    assert config.scaling == 32 / 4
    assert config.scaling_of("layers.1.q_proj") == 8 / 2
    assert config.scaling_of("layers.0.q_proj") == 6 / 2
    assert config.rank_of("layers.1.xq_proj") == 16  # whole parts of the name


def test_norm_axis_with_lora_reaches_the_magnitude_only_modules() -> None:
    assert AdapterConfig(method="lora", magnitude_only_modules=["o_proj"], norm_axis="in").norm_axis == "in"


def test_to_dict_holds_plain_containers_and_round_trips() -> None:
    config = AdapterConfig(rank=4, target_modules=["q_proj"], magnitude_only_modules=["o_proj"])
    assert AdapterConfig(**json.loads(json.dumps(config.to_dict()))) == config
