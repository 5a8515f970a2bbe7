"""Several tasks in one run: who judges what, whose numbers are whose, in one process and in two."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from jsonargparse import ArgumentParser
from rich.console import Console

from dora_lightning.data import Sample
from dora_lightning.task import Task
from tasks import NLVR, VQA, Captioning, CommonsenseQA, MathQA, Mixed, VideoQA

WORDS = ("true", "false")


def asked(source: str, *references: str, **row: Any) -> Sample:
    row = {"question_id": 1, "question": "?", **row}
    return Sample("?", references[0] if references else "", (), references, source=source, row=row)


def statement(identifier: str, truth: str) -> Sample:
    row = {"identifier": identifier}
    return Sample("?", truth, WORDS, (truth,), source="nlvr2", row=row)


def published() -> Mixed:
    """The tasks of VL-BART's image run, and a family of sources."""
    return Mixed(
        {
            "vqav2": VQA(variants={"vqav2": "vl_t5"}),
            "gqa": VQA(variants={"gqa": "label"}),
            "nlvr2": NLVR(),
            "coco_captions, tvc": Captioning(),
            "moving_shapes_*": VQA(),
        }
    )


# samples, texts, scores
BATCHES: list[tuple[list[Sample], list[str] | None, list[torch.Tensor] | None]] = [
    ([asked("vqav2", *["cat"] * 2, *["dog"] * 8), asked("vqav2", *["cat"] * 9, "dog")], ["cat", "cat"], None),
    ([asked("gqa", "left", question_id="1"), asked("gqa", "red", question_id="2")], ["left", "Red"], None),
    (
        [statement("dev-1-0-0", "true"), statement("dev-1-1-0", "true"), statement("dev-2-0-0", "false")],
        None,
        [torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), torch.tensor([-2.0, -1.0])],
    ),
    (
        [
            asked("coco_captions", "a cat on a mat", "the cat sits", image_id=1),
            asked("coco_captions", "two dogs run", "dogs are running", image_id=2),
        ],
        ["a cat on a mat", "a bus"],
        None,
    ),
    ([asked("moving_shapes_color", "red"), asked("moving_shapes_color", "blue")], ["red", "green"], None),
    ([asked("moving_shapes_first", "circle")], ["circle"], None),
    ([asked("moving_shapes_first_shuffled", "circle")], ["square"], None),
]


def judge_all(task: Mixed, batches: list[Any]) -> dict[str, float]:
    for samples, texts, scores in batches:
        task.update(samples, texts, scores)
    return {name: float(value) for name, value in task.compute().items()}


def test_a_batch_is_judged_by_the_task_of_its_source() -> None:
    task = published()
    kinds = [type(task.judge_of(samples)).__name__ for samples, _, _ in BATCHES]
    assert kinds == ["VQA", "VQA", "NLVR", "Captioning", "VQA", "VQA", "VQA"]
    assert task.judge_of(BATCHES[2][0]).ranks_options
    assert task.judge_of([asked("tvc")]).generation == Captioning().generation
    assert task.judge_of([asked("vqav2")]) is not task.judge_of([asked("gqa")])
    # of a run in a run, the one that judges
    assert isinstance(Mixed({"*": task}).judge_of([asked("nlvr2")]), NLVR)
    with pytest.raises(ValueError, match="a batch to be judged holds samples of one task, got those of 'vqav2', 'gqa'"):
        task.judge_of([asked("vqav2"), asked("gqa")])


def test_the_headline_is_the_mean_that_papers_report() -> None:
    results = judge_all(published(), BATCHES)
    assert results["vqav2/accuracy"] == pytest.approx((0.6 + 1) / 2)
    assert results["gqa/accuracy"] == 0.5
    assert results["nlvr2/accuracy"] == pytest.approx(2 / 3)
    assert results["nlvr2/consistency"] == 0.5
    assert results["moving_shapes/accuracy"] == pytest.approx(2 / 3)
    assert results["moving_shapes_first_shuffled/accuracy"] == 0.0
    captions = Captioning()
    captions.update(*BATCHES[3])
    cider = float(captions.compute()["coco_captions/cider_d"])
    assert 1 < cider < 9
    # of tvc nothing was judged
    assert results["mean/headline"] == pytest.approx((0.8 + 0.5 + 2 / 3 + cider + 2 / 3) / 5)
    assert [name for name in results if name.startswith("mean/")] == ["mean/headline"]


def test_the_video_run_too() -> None:
    task = Mixed({"tvqa, how2qa": VideoQA(), "tvc, yc2c": Captioning(max_new_tokens=19)})
    choices = ["a cat", "a dog"]
    for source, texts in (("tvqa", ["a1", "a0"]), ("how2qa", ["a1", "a1"])):
        task.update([asked(source, "a1", qid=number, choices=choices) for number in range(2)], texts)
    clips = [asked("yc2c", "stir the pan", clip_id=1), asked("yc2c", "cut it", clip_id=2)]
    task.update(clips, ["stir the pan", ""])
    results = {name: float(value) for name, value in task.compute().items()}
    assert (results["tvqa/accuracy"], results["how2qa/accuracy"]) == (0.5, 1.0)
    assert results["mean/headline"] == pytest.approx((0.5 + 1 + results["yc2c/cider_d"]) / 3)
    assert set(task.files(task.records())) == {
        *("tvqa_submission.json", "how2qa_submission.json", "yc2c_submission.jsonl")
    }


def test_nothing_is_left_after_a_reset() -> None:
    task = published()
    first = judge_all(task, BATCHES)
    task.reset()
    assert (task.compute(), task.records()) == ({}, [])
    assert judge_all(task, BATCHES) == first
    task.reset()
    assert set(judge_all(task, BATCHES[1:2])) == {"gqa/accuracy", "gqa/majority", "gqa/unparsed", "mean/headline"}


def test_a_source_goes_before_a_pattern_and_patterns_go_in_their_order() -> None:
    tasks: dict[str, Task] = {"easy_*": VQA(), "easy_vqa_*": MathQA(), "*_shape, easy_vqa_color": NLVR()}
    task = Mixed(tasks)
    owners = {"easy_vqa_shape": VQA, "easy_vqa_color": NLVR, "my_shape": NLVR}
    assert {source: type(task.judge_of([asked(source)])) for source in owners} == owners


def test_tasks_that_name_a_result_or_a_file_alike_are_told_apart() -> None:
    shown: dict[str, Task] = {"easy_vqa_shape": VQA(), "easy_vqa_color": VQA(), "gqa": VQA()}
    task = Mixed(shown)
    for source, answer in (("easy_vqa_shape", "circle"), ("easy_vqa_color", "red"), ("gqa", "left")):
        task.update([asked(source, answer)], ["red"])
    results = {name: float(value) for name, value in task.compute().items()}
    assert results["easy_vqa_shape/easy_vqa/accuracy"] == 0.0
    assert results["easy_vqa_color/easy_vqa/accuracy"] == 1.0
    assert "easy_vqa/accuracy" not in results
    assert results["mean/headline"] == pytest.approx(1 / 3)
    # each task still finds its own numbers
    assert [line.split() for line in render(task.table(results)) if "easy_vqa " in line] == [
        ["easy_vqa", "0.0", "100.0", "0.0"],
        ["easy_vqa", "100.0", "100.0", "0.0"],
    ]


def test_files_of_all_tasks(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path)
    task = published()
    judge_all(task, BATCHES)
    for source in ("vqav2", "gqa"):
        task.update([asked(source, "red", "red", question_id=3, image_path=str(path))], ["red"])
    files = task.files(task.records())
    assert set(files) == {
        *("vqav2_answers.jsonl", "vqav2_submission.json", "gqa_answers.jsonl", "gqa_submission.json"),
        *("vqav2_examples.png", "gqa_examples.png", "nlvr2_predictions.csv", "captions_coco_captions_results.json"),
    }
    assert files["nlvr2_predictions.csv"] == b"dev-1-0-0,True\ndev-1-1-0,False\ndev-2-0-0,False\n"
    assert task.files([{"source": "web", "question": "a row's own source"}]) == {}


def render(table: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_table_has_the_headline_numbers_and_those_of_each_task() -> None:
    task = published()
    for samples, texts, scores in BATCHES[:3]:
        task.update(samples, texts, scores)
    task.update([asked("tvc", "a cat sits there", clip_id=1)], ["a cat sits there"])
    task.update(*BATCHES[4])
    cells = [line.split() for line in render(task.table(task.compute())) if line.strip() and "─" not in line]
    assert cells == [
        ["Headline", "numbers", "(x", "100)"],
        ["data", "set", "measure", "score"],
        ["vqav2", "accuracy", "80.0"],
        ["gqa", "accuracy", "50.0"],
        ["nlvr2", "accuracy", "66.7"],
        ["tvc", "cider_d", "0.0"],  # one clip: every word is in all documents
        ["moving_shapes_*", "accuracy", "50.0"],
        ["mean", "49.3"],
        ["Visual", "question", "answering", "(%)"],
        ["data", "set", "accuracy", "unparsed"],
        ["vqav2", "80.0", "0.0"],
        ["Visual", "question", "answering", "(%)"],
        ["data", "set", "accuracy", "majority", "unparsed"],
        ["gqa", "50.0", "50.0", "0.0"],
        ["True", "or", "false", "(%)"],
        ["data", "set", "accuracy", "consistency", "majority"],
        ["nlvr2", "66.7", "50.0", "66.7"],
        ["Captions", "(x", "100)"],
        ["data", "set", "CIDEr-D", "BLEU-4", "BLEU-1", "ROUGE-L", "blank"],
        ["tvc", "0.0", "100.0", "100.0", "100.0", "0.0"],
        ["Visual", "question", "answering", "(%)"],
        ["data", "set", "accuracy", "majority", "unparsed"],
        ["moving_shapes", "50.0", "50.0", "0.0"],
        ["moving_shapes_color", "50.0", "50.0", "0.0"],
    ]


def test_tasks_of_text_alone_take_part() -> None:
    task = Mixed({"piqa": CommonsenseQA(), "math": MathQA()})
    option = ("solution1", "solution2")
    task.update([Sample("?", option[0], option, option[:1], source="piqa")], ["it is solution1"])
    # the task of which nothing was seen would warn, and has no number
    assert float(task.compute()["mean/headline"]) == 1.0
    task.update([Sample("?", "5", references=("5",), source="math", row={"source": "web"})], ["so 4"])
    results = {name: float(value) for name, value in task.compute().items()}
    assert (results["piqa/generation"], results["math/exact"], results["mean/headline"]) == (1.0, 0.0, 0.5)
    assert len(render(task.table(results))) > 10
    assert task.files(task.records()) == {}


def test_a_source_without_a_task_is_an_error() -> None:
    task = published()
    message = r"no task is for the source 'how2qa'; there are tasks for vqav2, gqa, nlvr2, coco_captions, tvc, moving_"
    with pytest.raises(ValueError, match=message):
        task.judge_of([asked("how2qa")])
    with pytest.raises(ValueError, match=message):
        task.update([asked("gqa", "left"), asked("how2qa", "a1")], ["left", "a1"])
    assert task.records() == []


SHARED = VQA()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "tasks: give at least one, as source -> task"),
        ({"vqav2, ": VQA()}, "tasks: a key is a source, a pattern, or several of these .* got 'vqav2, '"),
        ({"tvc, yc2c": Captioning(), "yc2c": Captioning()}, "'yc2c' is in the keys 'tvc, yc2c' and 'yc2c'"),
        ({"tvc,tvc": Captioning()}, "'tvc' is in the keys 'tvc,tvc' and 'tvc,tvc'"),
        ({"vqav2": SHARED, "gqa": SHARED}, "one task is given under several keys"),
    ],
)
def test_keys_that_are_none_are_errors(tasks: dict[str, Task], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixed(tasks)


def test_it_is_written_in_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--task", type=Task)
    config = parser.parse_string(
        """
        task:
          class_path: tasks.Mixed
          init_args:
            tasks:
              vqav2, gqa:
                class_path: tasks.VQA
                init_args: {variants: {vqav2: vl_t5, gqa: label}}
              nlvr2: tasks.NLVR
              tvc,yc2c:
                class_path: tasks.Captioning
                init_args: {max_new_tokens: 19}
              moving_shapes_*: tasks.VQA
        """
    )
    task = parser.instantiate(config).task
    assert isinstance(task, Mixed)
    assert task.judge_of([asked("gqa")]).variants["gqa"] == "label"
    assert task.judge_of([asked("yc2c")]).generation["max_new_tokens"] == 19
    assert isinstance(task.judge_of([asked("nlvr2")]), NLVR)


# which batches each process sees
SHARES: dict[str, tuple[list[int], list[int]]] = {
    "another task each": ([0, 2, 4], [1, 3, 5, 6]),
    "a process that sees nothing": ([], [0, 1, 2, 3, 4, 5, 6]),
    "nothing for anybody": ([], []),
    # of captions and statements, which have ids
    "samples again on the other": ([2, 3], [3, 2, 2]),
}


def compute(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    task = published()
    results = {}
    for share, batches in SHARES.items():
        for _ in range(2):  # again after a reset, as in the next epoch
            task.reset()
            results[share] = judge_all(task, [BATCHES[index] for index in batches[rank]])
    # samples of one batch apart: a sentence's pairs of images, and captions, on both processes
    task.reset()
    halves = []
    for samples, texts, scores in BATCHES:
        mine = slice(rank, None, 2)
        halves.append((samples[mine], texts and texts[mine], scores and scores[mine]))
    results["samples apart"] = judge_all(task, halves)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(compute, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert both[0] == both[1]
    everything = judge_all(published(), BATCHES)
    seen = {"nothing for anybody": {}, "samples again on the other": judge_all(published(), BATCHES[2:4])}
    for share, results in both[0].items():
        assert results == pytest.approx(seen.get(share, everything)), share
