"""PerSourceMean in one process and in two that see different sources and different numbers of samples."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from dora_lightning.metrics import PerSourceMean, per_source_mean

# torchmetrics' word on a process that has seen nothing
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric PerSourceMean was called before")


def test_means_in_order_of_name() -> None:
    means = per_source_mean(torch.tensor([1.0, 0.0, 4.0, 2.0]), ["b", "b", "a", "b"])
    assert list(means) == ["a", "b"]
    assert {name: float(value) for name, value in means.items()} == {"a": 4.0, "b": 1.0}


def test_batches_add_up_and_reset_forgets() -> None:
    metric = PerSourceMean()
    assert metric.compute() == {}
    metric.update(torch.tensor([1.0, 0.0]), ["boolq", "piqa"])
    metric.update(torch.tensor([0.0, 0.0, 1.0]), ["boolq", "boolq", "boolq"])
    assert {name: float(value) for name, value in metric.compute().items()} == {"boolq": 0.5, "piqa": 0.0}
    metric.reset()
    assert metric.compute() == {}


def test_a_batch_may_be_empty() -> None:
    metric = PerSourceMean()
    metric.update(torch.zeros(0), [])
    assert metric.compute() == {}
    metric.update(torch.ones(2), ["boolq", "piqa"])
    metric.update(torch.zeros(0), [])
    assert {name: float(value) for name, value in metric.compute().items()} == {"boolq": 1.0, "piqa": 1.0}


def test_an_update_that_raises_leaves_nothing_behind() -> None:
    metric = PerSourceMean()
    metric.update(torch.ones(1), ["boolq"])
    with pytest.raises(ValueError, match="64 bytes at most"):
        metric.update(torch.zeros(1), ["n" * 65])
    metric.update(torch.full((1,), 2.0), ["piqa"])
    assert {name: float(value) for name, value in metric.compute().items()} == {"boolq": 1.0, "piqa": 2.0}


def test_names_of_any_script_and_up_to_64_bytes() -> None:
    metric = PerSourceMean()
    names = ["largeur", "größe", "大小", "n" * 64, ""]
    metric.update(torch.arange(5.0), names)
    assert {name: float(value) for name, value in metric.compute().items()} == dict(zip(names, range(5), strict=True))
    with pytest.raises(ValueError, match="64 bytes at most"):
        metric.update(torch.ones(1), ["n" * 65])
    with pytest.raises(ValueError, match="got 2 values for 1 sources"):
        metric.update(torch.ones(2), ["a"])


# what each of two processes sees
DISTRIBUTED: dict[str, tuple[Any, Any]] = {
    "different sources, uneven counts": (
        [([1.0, 0.0, 1.0], ["boolq", "boolq", "piqa"]), ([1.0], ["boolq"])],
        [([0.0], ["siqa"]), ([], [])],
    ),
    "one process without any sample": ([([1.0, 0.0], ["boolq", "piqa"])], []),
    "the first process without any sample": ([], [([1.0, 0.0, 0.0], ["boolq", "piqa", "boolq"])]),
    "no sample at all": ([], []),
}


def compute(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for case, batches in DISTRIBUTED.items():
        metric = PerSourceMean()
        for _ in range(2):  # again after a reset, as in the next epoch
            metric.reset()
            for values, sources in batches[rank]:
                metric.update(torch.tensor(values), sources)
            results[case] = {name: float(value) for name, value in metric.compute().items()}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    expected = {}
    for case, batches in DISTRIBUTED.items():
        single = PerSourceMean()
        for values, sources in batches[0] + batches[1]:
            single.update(torch.tensor(values), sources)
        expected[case] = {name: float(value) for name, value in single.compute().items()}
    mp.spawn(compute, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == expected
