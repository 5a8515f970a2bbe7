"""Measures of each benchmark, and their mean, counted by hand; in one process and in two."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from rich.console import Console

from dora_lightning.data import Sample
from tasks import VQA
from tasks.vqa_results import Judged, vqa_results


def rounded(results: dict[str, Any]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in results.items()}


def test_one_short_answer() -> None:
    judged = [
        Judged("gqa", 1.0, truth="left"),
        Judged("gqa", 0.0, truth="left", parsed=False),
        Judged("gqa", 0.0, truth="left"),
        Judged("gqa", 1.0, truth="right"),
    ]
    assert rounded(vqa_results(judged)) == {
        "gqa/accuracy": 0.5,
        "gqa/unparsed": 0.25,
        "gqa/majority": 0.75,
        "mean/accuracy": 0.5,
    }


def test_several_short_answers_have_no_majority() -> None:
    judged = [Judged("vqav2", 0.3), Judged("vqav2", 0.9), Judged("textvqa", 1.0)]
    assert rounded(vqa_results(judged)) == {
        "textvqa/accuracy": 1.0,
        "textvqa/unparsed": 0.0,
        "vqav2/accuracy": 0.6,
        "vqav2/unparsed": 0.0,
        "mean/accuracy": 0.8,
    }


def test_easy_vqa_counts_questions_and_is_one_benchmark() -> None:
    judged = [
        Judged("easy_vqa_shape", 1.0, truth="circle"),
        Judged("easy_vqa_yes_no", 0.0, truth="no"),
        Judged("easy_vqa_yes_no", 0.0, truth="yes"),
        Judged("easy_vqa_yes_no", 1.0, truth="yes"),
        Judged("gqa", 1.0, truth="left"),
    ]
    results = rounded(vqa_results(judged))
    assert results["easy_vqa_shape/accuracy"] == 1.0
    assert results["easy_vqa_yes_no/accuracy"] == 0.3333
    assert results["easy_vqa/accuracy"] == 0.5  # 2 of 4 questions; the mean of the kinds would be 0.6667
    assert results["easy_vqa_yes_no/majority"] == 0.6667
    assert results["easy_vqa/majority"] == 0.75  # circle, and yes, yes
    assert results["mean/accuracy"] == 0.75  # of easy-VQA's 0.5 and GQA's 1


def test_moving_shapes_are_counted_without_those_whose_frames_are_shuffled() -> None:
    judged = [
        Judged("moving_shapes_color", 1.0, truth="red"),
        Judged("moving_shapes_first", 1.0, truth="circle"),
        Judged("moving_shapes_first", 1.0, truth="square"),
        Judged("moving_shapes_first", 0.0, truth="square", parsed=False),
        Judged("moving_shapes_first_shuffled", 0.0, truth="circle"),
        Judged("moving_shapes_first_shuffled", 0.0, truth="square"),
        Judged("gqa", 1.0, truth="left"),
    ]
    results = rounded(vqa_results(judged))
    assert results["moving_shapes/accuracy"] == 0.75
    assert results["moving_shapes/unparsed"] == 0.25
    assert results["moving_shapes/majority"] == 0.75  # red, and square of three
    assert results["moving_shapes_first/accuracy"] == 0.6667
    assert results["moving_shapes_first_shuffled/accuracy"] == 0.0
    assert results["moving_shapes_first_shuffled/majority"] == 0.5
    assert results["mean/accuracy"] == 0.875  # of 0.75 and GQA's 1
    # alone they are shown, and are nobody's number
    alone = rounded(vqa_results(judged[4:6]))
    assert {name.rpartition("/")[0] for name in alone} == {"moving_shapes_first_shuffled"}


def test_scienceqa_is_known_by_its_questions_with_an_image() -> None:
    judged = [
        Judged("scienceqa", 1.0, ranked=0.0, has_image=True),
        Judged("scienceqa", 0.0, ranked=1.0, has_image=False),
        Judged("scienceqa", 0.0, ranked=1.0, has_image=False, parsed=False),
    ]
    assert rounded(vqa_results(judged)) == {
        "scienceqa/accuracy": 1.0,
        "scienceqa/overall": 0.3333,
        "scienceqa/unparsed": 0.3333,
        "scienceqa/ranking": 0.0,
        "scienceqa/ranking_overall": 0.6667,
        "mean/accuracy": 1.0,
        "mean/ranking": 0.0,
    }
    assert rounded(vqa_results(judged[1:])).keys() == {
        "scienceqa/overall",
        "scienceqa/unparsed",
        "scienceqa/ranking_overall",
    }


def pope(split: str, answer: str, truth: str) -> Judged:
    return Judged(f"pope_{split}", float(answer == truth), ranked=1.0, answer=answer, truth=truth)


def test_pope_is_known_by_the_mean_of_its_f1() -> None:
    judged = [
        # one hit, one false yes, one missed yes, one right no
        *(pope("random", *pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"))),
        # yes alone: precision 1/3, recall 1, F1 = 2 / (3 + 1)
        *(pope("popular", *pair) for pair in (("yes", "yes"), ("yes", "no"), ("yes", "no"))),
    ]
    assert rounded(vqa_results(judged)) == {
        "pope_popular/accuracy": 0.3333,
        "pope_popular/precision": 0.3333,
        "pope_popular/recall": 1.0,
        "pope_popular/f1": 0.5,
        "pope_popular/yes_ratio": 1.0,
        "pope_popular/majority": 0.6667,
        "pope_popular/ranking": 1.0,
        "pope_random/accuracy": 0.5,
        "pope_random/precision": 0.5,
        "pope_random/recall": 0.5,
        "pope_random/f1": 0.5,
        "pope_random/yes_ratio": 0.5,
        "pope_random/majority": 0.5,
        "pope_random/ranking": 1.0,
        "pope/f1": 0.5,
        "pope/ranking": 1.0,
        "mean/accuracy": 0.5,
        "mean/ranking": 1.0,
    }


def mmbench(number: int, score: float, ranked: float, category: str) -> Judged:
    return Judged("mmbench", score, ranked=ranked, number=number, categories=("logic", category))


def test_mmbench_counts_questions_that_are_right_in_every_rotation() -> None:
    judged = [
        mmbench(7, 1.0, 1.0, "maps"),
        mmbench(1_000_007, 0.0, 1.0, "maps"),
        mmbench(8, 1.0, 0.0, "maps"),
        mmbench(1_000_008, 1.0, 0.0, "maps"),
        mmbench(9, 1.0, 0.0, "plots"),
    ]
    assert rounded(vqa_results(judged)) == {
        "mmbench/accuracy": 0.6667,  # questions 8 and 9; of the rows it would be 0.8
        "mmbench/logic/accuracy": 0.6667,
        "mmbench/maps/accuracy": 0.5,
        "mmbench/plots/accuracy": 1.0,
        "mmbench/ranking": 0.3333,
        "mmbench/logic/ranking": 0.3333,
        "mmbench/maps/ranking": 0.5,
        "mmbench/plots/ranking": 0.0,
        "mmbench/unparsed": 0.0,
        "mean/accuracy": 0.6667,
        "mean/ranking": 0.3333,
    }


def test_nothing_judged() -> None:
    assert vqa_results([]) == {}


def easy(kind: str, truth: str) -> Sample:
    return Sample("...", truth, references=(truth,), source=f"easy_vqa_{kind}", row={"question_id": 1, "question": "?"})


def rotation(index: int) -> Sample:
    row = {"question_id": index, "index": index, "question": "?", "category": "maps", "options": {"A": "x", "B": "y"}}
    return Sample("...", "A", references=("A",), source="mmbench", row=row)


# the batches of two processes: another most frequent answer in each, a question's rotations apart
BATCHES: dict[str, tuple[Any, Any]] = {
    "uneven": (
        [
            ([easy("yes_no", "yes"), easy("yes_no", "yes"), rotation(7)], ["yes", "no", "A"]),
            ([easy("shape", "circle")], ["circle"]),
        ],
        [([easy("yes_no", "no"), easy("yes_no", "no"), easy("yes_no", "no"), rotation(1_000_007)], ["no"] * 3 + ["B"])],
    ),
    "a process without samples": ([], [([easy("shape", "circle")], ["circle"])]),
    "no sample at all": ([], []),
}
EXPECTED = {
    "uneven": {
        "easy_vqa_yes_no/accuracy": 0.8,
        "easy_vqa_yes_no/majority": 0.6,  # no; a mean of the two processes' own would be 1
        "easy_vqa/accuracy": 0.8333,
        "easy_vqa/majority": 0.6667,
        "mmbench/accuracy": 0.0,
        "mmbench/maps/accuracy": 0.0,
        "mean/accuracy": 0.4167,
    },
    "a process without samples": {"easy_vqa/accuracy": 1.0, "mean/accuracy": 1.0},
    "no sample at all": {},
}


def compute(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for case, batches in BATCHES.items():
        task = VQA(submissions=False)
        for _ in range(2):  # again after a reset, as in the next epoch
            task.reset()
            for samples, texts in batches[rank]:
                task.update(samples, texts)
            results[case] = rounded(task.compute())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(compute, (str(tmp_path),), nprocs=2)
    for case, batches in BATCHES.items():
        single = VQA(submissions=False)
        for samples, texts in batches[0] + batches[1]:
            single.update(samples, texts)
        expected = rounded(single.compute())
        assert expected | EXPECTED[case] == expected
        for rank in range(2):
            assert torch.load(tmp_path / f"{rank}.pt", weights_only=True)[case] == expected


def render(table: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_table_has_sources_in_rows_and_dashes_where_a_measure_does_not_apply() -> None:
    judged = [
        Judged("gqa", 0.5, truth="left", ranked=1.0),
        Judged("vqav2", 0.3),
        pope("adversarial", "yes", "yes"),
        mmbench(7, 1.0, 0.0, "maps"),
        Judged("scienceqa", 1.0, ranked=0.0),
        Judged("scienceqa", 0.0, ranked=1.0, parsed=False, has_image=False),
    ]
    lines = render(VQA().table(vqa_results(judged)))
    cells = [line.split() for line in lines if line.strip() and "─" not in line]
    assert cells == [
        ["Visual", "question", "answering", "(%)"],
        ["data", "set", "accuracy", "F1", "ranking", "majority", "unparsed"],
        ["gqa", "50.0", "-", "100.0", "100.0", "0.0"],
        ["mmbench", "100.0", "-", "0.0", "-", "0.0"],
        ["pope", "-", "100.0", "100.0", "-", "-"],
        ["pope_adversarial", "100.0", "100.0", "100.0", "100.0", "-"],
        ["scienceqa", "100.0", "-", "0.0", "-", "50.0"],
        ["scienceqa", "(all)", "50.0", "-", "50.0", "-", "-"],
        ["vqav2", "30.0", "-", "-", "-", "0.0"],
        ["mean", "76.0", "-", "50.0", "-", "-"],
        ["POPE", "(%)"],
        ["yes"],
        ["split", "accuracy", "precision", "recall", "F1", "ratio"],
        ["pope_adversarial", "100.0", "100.0", "100.0", "100.0", "100.0"],
        ["MMBench", "by", "category", "(%)"],
        ["category", "accuracy", "ranking"],
        ["logic", "100.0", "0.0"],
        ["maps", "100.0", "0.0"],
    ]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["a data set of mine with a name that is long", "mine/of/may"])
def test_own_data_sets_may_have_any_name(name: str) -> None:
    results = vqa_results([Judged(name, 1.0, truth="x"), Judged(name, 0.0, truth="y")])
    assert rounded(results)[f"{name}/accuracy"] == 0.5
    assert rounded(results)["mean/accuracy"] == 0.5
    lines = render(VQA().table(results))
    assert max(map(len, lines)) <= 80
    assert any("50.0" in line for line in lines)
