"""WarmupDecay against the schedules of transformers, and its resumption with another length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from transformers import get_linear_schedule_with_warmup as get_linear

from dora_lightning.training import WarmupDecay

STEPS = 23


def optimizer() -> SGD:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.5, 0.02)]
    return SGD(groups, lr=1.0)


def rates(scheduler: Any, steps: int) -> list[list[float]]:
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def constant(optimizer: SGD, warmup: int, steps: int) -> LambdaLR:
    return get_constant_schedule_with_warmup(optimizer, warmup)


@pytest.mark.parametrize("warmup", [0, 1, 5, STEPS - 1])
@pytest.mark.parametrize(
    ("decay", "oracle"),
    [("linear", get_linear), ("cosine", get_cosine_schedule_with_warmup), ("constant", constant)],
)
def test_rates_are_those_of_transformers(decay: str, oracle: Callable[..., LambdaLR], warmup: int) -> None:
    ours = rates(WarmupDecay(optimizer(), warmup, decay, total_steps=STEPS), STEPS + 1)
    theirs = rates(oracle(optimizer(), warmup, STEPS), STEPS + 1)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6, atol=1e-9)


def test_a_share_of_the_run_is_warmup() -> None:
    share = rates(WarmupDecay(optimizer(), 0.1, total_steps=50), 50)
    assert share == rates(WarmupDecay(optimizer(), 5, total_steps=50), 50)


def test_the_length_may_be_said_later() -> None:
    late = WarmupDecay(optimizer(), 3)
    assert [group["lr"] for group in late.optimizer.param_groups] == [0.0, 0.0]
    late.set_total_steps(STEPS)
    assert rates(late, STEPS) == rates(WarmupDecay(optimizer(), 3, total_steps=STEPS), STEPS)
    without_warmup = WarmupDecay(optimizer())
    without_warmup.set_total_steps(STEPS)
    assert without_warmup.get_last_lr() == [0.5, 0.02]


def test_a_length_that_is_never_said_is_an_error() -> None:
    schedule = WarmupDecay(optimizer(), 3)
    schedule.optimizer.step()
    with pytest.raises(ValueError, match="needs total_steps"):
        schedule.step()


def test_a_resumed_schedule_keeps_its_place_and_takes_the_length_of_the_present_run() -> None:
    first = WarmupDecay(optimizer(), 4, total_steps=20)
    rates(first, 10)
    resumed = WarmupDecay(optimizer(), 4, total_steps=40)
    resumed.load_state_dict(first.state_dict())
    expected = rates(WarmupDecay(optimizer(), 4, total_steps=40), 41)
    rates(resumed, 1)  # the rate of the step it was saved at is the optimiser's to restore
    assert rates(resumed, 30) == expected[11:]


def test_state_loads_with_weights_only(tmp_path: Any) -> None:
    schedule = WarmupDecay(optimizer(), 4, total_steps=20)
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["last_epoch"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "share in|number of at least 0"),
        ({"warmup": 1.5}, "whole number of steps, got 1.5"),
        ({"decay": "sudden"}, "linear, cosine, constant, got 'sudden'"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupDecay(optimizer(), **options)
