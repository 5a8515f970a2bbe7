"""Two processes with gloo score what one would: uneven batches, and processes that see nothing.

Expected numbers are counted by hand below, so that a sample counted twice, or not at all, shows.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torchmetrics import Metric

from dora_lightning.metrics import (
    POPE,
    CaptionScores,
    CIDErD,
    CircularAccuracy,
    ExactMatch,
    LetterAccuracy,
    VQAAccuracy,
)

# torchmetrics' word on a process that has seen nothing
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before")

METRICS: dict[str, type[Metric]] = {
    "vqa": VQAAccuracy,
    "exact": ExactMatch,
    "letter": LetterAccuracy,
    "circular": CircularAccuracy,
    "pope": POPE,
    "cider": CIDErD,
    "captions": CaptionScores,
}

CAPTIONS = (
    ["A cat on a mat.", "two dogs run", "a man's hat", "", "a red bus on a street"],
    [
        ["a cat sits on a mat", "a cat on the mat"],
        ["Two dogs are running!", "two dogs run on grass", "dogs"],
        ["the man's hat is red"],
        ["a boy eats pizza", "a pizza"],
        ["a red bus on the street", "a bus in a street", "a red bus on a street."],
    ],
    ["cat", "dogs", 3, "大小", "bus"],
)
PEOPLE = ["cat"] * 2 + ["dog"] * 8
# five samples per metric, as columns of update's arguments
SAMPLES: dict[str, tuple[list[Any], ...]] = {
    "vqa": (["cat", "cat", "bird", "dog", "a dog"], [PEOPLE] * 5),  # .6 .6 0 1 1
    "exact": (["Yes.", "no", "left", "red", "blue"], ["yes", "yes", "left", "red", "green"]),
    "letter": (["A", None, "C", "D", "B"], ["A", "B", "C", "C", "B"]),
    # question 5 has rotations on both processes, of which one is wrong; 6 is right on both
    "circular": (
        [1, 1, 1, 0, 1],
        [5, 6, 1_000_006, 1_000_005, 7],
        ["ocr", "map", "map", "ocr", "大小"],
        ["fine", "fine", "fine", "fine", "logic"],
    ),
    # random: TP, FP, TN; popular: FN, TP
    "pope": (
        ["Yes", "Yes", "No", "no", "yes"],
        ["yes", "no", "no", "yes", "yes"],
        ["random", "random", "random", "popular", "popular"],
    ),
    "cider": CAPTIONS,
    "captions": CAPTIONS,
}
EXPECTED: dict[str, Any] = {
    "vqa": 3.2 / 5,
    "exact": 3 / 5,
    "letter": 3 / 5,
    "circular": {
        "accuracy": 2 / 3,
        "category/map": 1.0,
        "category/ocr": 0.0,
        "category/大小": 1.0,
        "l2_category/fine": 0.5,
        "l2_category/logic": 1.0,
    },
    "pope": {
        "popular/accuracy": 1 / 2,
        "popular/precision": 1.0,
        "popular/recall": 1 / 2,
        "popular/f1": 2 / 3,
        "popular/yes_ratio": 1 / 2,
        "random/accuracy": 2 / 3,
        "random/precision": 1 / 2,
        "random/recall": 1.0,
        "random/f1": 2 / 3,
        "random/yes_ratio": 2 / 3,
        "f1": 2 / 3,
    },
    # of pycocoevalcap 1.2, with its own tokenizer
    "cider": 3.5211353,
    "captions": {
        "cider_d": 3.5211353,
        "bleu_1": 0.7153837,
        "bleu_2": 0.7093466,
        "bleu_3": 0.6730643,
        "bleu_4": 0.5829423,
        "rouge_l": 0.6947084,
    },
}
# which samples each process sees, batch by batch
SHARES: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "uneven": ([[0, 1], [2]], [[3, 4]]),
    "an uneven last batch": ([[0, 2], [4]], [[1, 3], []]),
    "a process without any sample": ([[0, 1, 2, 3, 4]], []),
    "the first process without any sample": ([], [[0], [1, 2, 3], [4]]),
    "one batch more": ([[4]], [[3], [2], [1], [0]]),
}
# what a distributed sampler fills up with, which ids tell
REPEATED: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "the first sample again": ([[0, 2], [4]], [[1, 3], [0]]),
    "on one process, which sees all": ([[0, 1], [2, 3, 4, 0, 1]], []),
    "all on both": ([[0, 1, 2, 3, 4]], [[4, 3, 2], [1, 0]]),
}
WITH_IDS = ("cider", "captions")
CASES = [(name, share) for name in METRICS for share in (*SHARES, *(REPEATED if name in WITH_IDS else ()))]


def update(metric: Metric, name: str, chosen: list[int]) -> None:
    columns: list[Any] = [[column[index] for index in chosen] for column in SAMPLES[name]]
    if name == "circular":
        columns[0] = torch.tensor(columns[0])
    metric.update(*columns)


def plain(result: Any) -> Any:
    return {key: float(value) for key, value in result.items()} if isinstance(result, dict) else float(result)


def compute(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[tuple[str, str, str], Any] = {}
    for name, share in CASES:
        batches = (SHARES | REPEATED)[share]
        # a process that has seen nothing new would answer from its cache and leave the others waiting
        metric = METRICS[name](compute_with_cache=False)
        for _ in range(2):  # again after a reset, as in the next epoch
            metric.reset()
            for chosen in batches[rank]:
                update(metric, name, chosen)
            results[name, share, "at the end"] = plain(metric.compute())
        # as with a look at the numbers after every batch: what came from the others must not be kept
        metric.reset()
        for step in range(max(len(batches[0]), len(batches[1]))):
            for chosen in batches[rank][step : step + 1]:
                update(metric, name, chosen)
            results[name, share, "after every batch"] = plain(metric.compute())
    for name, kind in METRICS.items():
        results[name, "nothing", "at the end"] = plain(kind().compute())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str, str], Any]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(compute, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("when", ["at the end", "after every batch"])
@pytest.mark.parametrize(("name", "share"), CASES)
def test_two_processes_count_every_sample_once(results: list[Any], name: str, share: str, when: str) -> None:
    for rank in range(2):
        assert results[rank][name, share, when] == pytest.approx(EXPECTED[name]), f"process {rank}"


@pytest.mark.parametrize("name", METRICS)
def test_one_process_agrees(name: str) -> None:
    metric = METRICS[name]()
    update(metric, name, [3, 1])
    update(metric, name, [])
    update(metric, name, [0, 2, 4])
    assert plain(metric.compute()) == pytest.approx(EXPECTED[name])


@pytest.mark.parametrize("name", METRICS)
def test_nothing_seen_by_anybody(results: list[Any], name: str) -> None:
    nothing: Any = {"circular": {}, "pope": {}, "captions": dict.fromkeys(EXPECTED["captions"], float("nan"))}
    nothing = pytest.approx(nothing.get(name, float("nan")), nan_ok=True)
    for rank in range(2):
        assert results[rank][name, "nothing", "at the end"] == nothing
