import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from datamodules import (
    ARC_OR_OPENBOOKQA,
    TASKS,
    CommonsenseDataModule,
    TextDataModule,
    get_template,
    parse_hub_row,
    render_row,
)
from tests.datamodules.commonsense_examples import HUB_ROWS, row_of

OWN = {
    "instruction": "Is the film good?\nAnswer format: good/bad",
    "input": "I slept.",
    "output": "It is bad.",
    "answer": "bad",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """LLM-Adapters' layout with ten rows per file; piqa has no training file."""
    for task in ("piqa", "winogrande", "boolq", "AddSub"):
        (tmp_path / task).mkdir()
        rows = [{**(OWN if task == "AddSub" else row_of(task)), "id": number} for number in range(10)]
        (tmp_path / task / "test.json").write_text(json.dumps(rows))
        if task != "piqa":
            (tmp_path / task / "train.json").write_text(json.dumps(rows))
    return tmp_path


def module(data_dir: Path | None, **options: Any) -> CommonsenseDataModule:
    options = {"val_size": 0, **options}
    return CommonsenseDataModule("unused", None if data_dir is None else str(data_dir), **options)


def test_all_is_every_task_with_the_file_in_the_published_order(folder: Path) -> None:
    data = module(folder)
    assert data.train_tasks == ["boolq", "winogrande"]
    assert data.test_tasks == ["boolq", "piqa", "winogrande"]
    assert list(Counter(sample.source for sample in data.build_samples("test"))) == data.test_tasks


def test_label_style_is_the_published_protocol(folder: Path) -> None:
    data = module(folder, test_tasks=["winogrande"], train_tasks=["winogrande"])
    row = {**row_of("winogrande"), "id": 0}
    train, test = data.build_samples("train")[0], data.build_samples("test")[0]
    assert train.prompt == get_template("llm_adapters").train_prompt(row["instruction"])
    assert test.prompt == get_template("llm_adapters").eval_prompt(row["instruction"])
    assert train == test._replace(prompt=train.prompt)
    assert train.target == "the correct answer is option2"
    assert train.options == ("the correct answer is option1", "the correct answer is option2")
    assert train.references == ("option2",)
    assert train.source == "winogrande"
    assert train.row == row


def test_a_template_s_prefix_leads_target_and_options(folder: Path) -> None:
    sample = module(folder, test_tasks=["boolq"], template="plain").build_samples("test")[0]
    assert sample.target == " the correct answer is false"
    assert sample.options == (" the correct answer is true", " the correct answer is false")
    assert sample.references == ("false",)


def test_text_style_shows_the_question_and_wants_the_text(folder: Path) -> None:
    data = module(folder, answer_style="text", template="plain")
    sample = next(sample for sample in data.build_samples("test") if sample.source == "winogrande")
    assert sample.prompt == "Question: Ann beat Bo, so _ won.\nAnswer:"
    assert sample.target == " Bo"
    assert sample.options == (" Ann", " Bo")
    assert sample.references == ("Bo",)


def test_rows_of_the_user_s_own_work_in_label_style(folder: Path) -> None:
    sample = module(folder, train_tasks=["AddSub"], template="alpaca").build_samples("train")[0]
    assert sample.prompt == get_template("alpaca").train_prompt(OWN["instruction"], "I slept.")
    assert sample.target == "It is bad."
    assert sample.options == ("It is good.", "It is bad.")
    assert sample.references == ("bad",)
    assert sample.source == "AddSub"
    with pytest.raises(ValueError, match=r"AddSub/train\.json, row 1: .*use answer_style: label"):
        module(folder, train_tasks=["AddSub"], answer_style="text").build_samples("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": "Is it good?"}, "must end in the valid labels"),
        ({"answer": "fine"}, "field 'answer' must be one of good/bad, found 'fine'"),
        ({"output": "No."}, "field 'output' must contain the answer 'bad', found 'No.'"),
        ({"output": 3}, "field 'output' must be text, found int"),
    ],
)
def test_bad_rows_stop_or_are_skipped(folder: Path, change: dict[str, Any], message: str) -> None:
    (folder / "AddSub/train.json").write_text(json.dumps([OWN, {**OWN, **change}]))
    with pytest.raises(ValueError, match=rf"AddSub/train\.json, row 2: .*{message}"):
        module(folder, train_tasks=["AddSub"]).build_samples("train")
    with pytest.warns(UserWarning, match=rf"1 of 2 rows were skipped; .*{message}"):
        assert len(module(folder, train_tasks=["AddSub"], on_bad_row="skip").build_samples("train")) == 1


def test_combined_file(tmp_path: Path) -> None:
    path = tmp_path / "commonsense_170k.json"
    path.write_text(json.dumps([*(row_of(task) for task in TASKS), OWN]))
    samples = module(None, train_file=str(path)).build_samples("train")
    arc = ARC_OR_OPENBOOKQA
    assert [sample.source for sample in samples] == [
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", arc, "social_i_qa", arc, "custom",
    ]  # fmt: skip
    assert [sample.references[0] for sample in samples[:2]] == ["false", "solution2"]
    with pytest.raises(ValueError, match="there is nothing to test on: only train_file was given"):
        module(None, train_file=str(path)).build_samples("test")


def test_validation_is_a_seeded_part_of_training(folder: Path) -> None:
    def ids(stage: Any, **options: Any) -> list[tuple[str, int]]:
        samples = module(folder, **options).build_samples(stage)
        return [(sample.source, sample.row["id"]) for sample in samples if sample.row]

    whole = ids("train")
    assert whole == [(task, number) for task in ("boolq", "winogrande") for number in range(10)]
    train, validation = ids("train", val_size=6), ids("validate", val_size=6)
    assert len(validation) == 6
    assert sorted(train + validation) == whole
    assert ids("validate", val_size=6, seed=1) != validation
    with pytest.raises(ValueError, match="val_size=20 must be at least 0 and leave something of 20"):
        ids("train", val_size=20)


def test_limits_are_per_task_and_seeded(folder: Path) -> None:
    data = module(folder, limit_train=3, limit_test=4)
    assert Counter(sample.source for sample in data.build_samples("train")) == {"boolq": 3, "winogrande": 3}
    test = data.build_samples("test")
    assert Counter(sample.source for sample in test) == {"boolq": 4, "piqa": 4, "winogrande": 4}
    assert test == module(folder, limit_test=4).build_samples("test")
    assert test != module(folder, limit_test=4, seed=1).build_samples("test")


def test_hub_data_sets_give_the_rows_of_the_files(tmp_path: Path) -> None:
    hub = {}
    for task, row in HUB_ROWS.items():
        (tmp_path / task).mkdir()
        splits = ("train", "validation" if task in TASKS[:5] else "test")  # the rows that LLM-Adapters tests on
        for split in splits:
            (tmp_path / task / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        hub[task] = str(tmp_path / task)
    data = module(None, hub=hub)
    data.prepare_data()
    test = data.build_samples("test")
    assert [sample.row for sample in test] == [row_of(task) for task in TASKS]
    assert [sample.source for sample in data.build_samples("train")] == list(TASKS)
    assert test[0].row == render_row(parse_hub_row(HUB_ROWS["boolq"], "boolq"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_tasks": ["bolq"]}, ValueError, r"train_tasks: unknown task 'bolq'\. Did you mean 'boolq'\? Known"),
        ({"test_tasks": ["arc-easy"]}, ValueError, r"unknown task 'arc-easy'\. Did you mean 'ARC-Easy'\?"),
        ({"test_tasks": "boolq"}, ValueError, r"test_tasks must be 'all' or a list of tasks, found 'boolq'"),
        ({"template": "vicuna"}, ValueError, "unknown template 'vicuna'"),
        ({"answer_style": "letter"}, ValueError, "answer_style must be 'label' or 'text', found 'letter'"),
        ({"hub": True}, ValueError, "give data_dir or hub, not both"),
        ({"train_file": "x.json"}, FileNotFoundError, r"train_file x\.json: no such file"),
        ({"train_file": "x.json", "train_tasks": ["boolq"]}, ValueError, "train_tasks .* no effect beside train_file"),
    ],
)
def test_arguments_are_checked_at_once(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        module(folder, **options)


def test_missing_data(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data: give data_dir"):
        module(None)
    with pytest.raises(FileNotFoundError, match=r"data_dir .*nowhere is not a folder"):
        module(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"piqa/train\.json: no such file; tasks with .*: AddSub, boolq"):
        module(folder, train_tasks=["piqa"]).build_samples("train")
    with pytest.raises(FileNotFoundError, match=r"holds none of the eight tasks with test\.json"):
        module(folder / "boolq").build_samples("test")


def test_real_files(real_data: Path, tokenizer_folder: str) -> None:
    data = CommonsenseDataModule(
        tokenizer_folder, str(real_data), limit_train=200, limit_test=50, val_size=40, cutoff_len=2048
    )
    data.setup("fit")
    data.setup("test")
    assert data.train_tasks == ["boolq", "ARC-Challenge", "ARC-Easy", "openbookqa"]
    trained = {id(sample) for batch in data.train_dataloader() for sample in batch["samples"]}
    assert len(trained) == 4 * 200 - 40
    tested = [sample for batch in data.test_dataloader() for sample in batch["samples"]]
    assert Counter(sample.source for sample in tested) == dict.fromkeys(data.train_tasks, 50)


def test_all_real_rows_in_both_styles(real_data: Path) -> None:
    counts = {"boolq": 3270, "ARC-Challenge": 1172, "ARC-Easy": 2376, "openbookqa": 500}
    for style, template in (("label", "llm_adapters"), ("text", "plain")):
        samples = module(real_data, answer_style=style, template=template).build_samples("test")
        assert Counter(sample.source for sample in samples) == counts
        assert all(sample.options.count(sample.target) >= 1 for sample in samples)
        assert all(sample.target.endswith(sample.references[0]) for sample in samples)


def test_arguments_come_from_yaml(folder: Path, tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextDataModule, "data")
    config = tmp_path / "config.yaml"
    config.write_text(
        "data:\n  class_path: datamodules.CommonsenseDataModule\n  init_args:\n    tokenizer: some-model\n"
        f"    data_dir: {folder}\n    train_tasks: [boolq]\n    test_tasks: all\n    limit_test: 3\n"
    )
    data = parser.instantiate(parser.parse_path(str(config))).data
    assert isinstance(data, CommonsenseDataModule)
    assert (data.train_tasks, data.test_tasks) == (["boolq"], ["boolq", "piqa", "winogrande"])
    assert (data.tokenizer_name, data.batch_size, data.limit_test) == ("some-model", 16, 3)
