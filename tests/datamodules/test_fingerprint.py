"""Digests of what is trained on: what changes them, what does not, and that a run that goes on says so."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from tiny import MakeData, boolq_row, write_rows
from transformers import AutoTokenizer

from datamodules import InstructionDataModule, PreferenceDataModule
from datamodules.encoding import EncodedSample
from datamodules.fingerprint import fingerprint, tokenizer_fingerprint
from dora_lightning.data import Sample


def data(llama: Path, file: Path, **options: Any) -> InstructionDataModule:
    made = InstructionDataModule(tokenizer=str(llama), **({"train_file": str(file), "template": "alpaca"} | options))
    made.setup("fit")
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.json", [boolq_row(number) for number in range(8)])
    return tmp_path / "train.json"


def rewritten(file: Path, rows: list[dict[str, str]]) -> Path:
    path = file.with_name("other.json")
    write_rows(path, rows)
    return path


def said(before: InstructionDataModule, now: InstructionDataModule, fn: TrainerFn = TrainerFn.FITTING) -> list[str]:
    """What is said when training with ``now`` goes on from a checkpoint of ``before``."""
    now.trainer = SimpleNamespace(state=SimpleNamespace(fn=fn))  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # a checkpoint holds plain values
        now.load_state_dict(json.loads(json.dumps(before.state_dict())))
    return [str(warning.message).partition(":")[0].partition(",")[0] for warning in caught]


OTHER_SAMPLES = "training goes on with other samples than the checkpoint's run had"
OTHER_TOKENS = "the training samples are those of the checkpoint's run"


def test_the_same_data_are_the_same(tiny_llama: Path, file: Path) -> None:
    rows = json.loads(file.read_text())
    assert said(data(tiny_llama, file), data(tiny_llama, rewritten(file, rows), batch_size=3, num_workers=0)) == []
    # evaluation reads what it likes
    other = data(tiny_llama, rewritten(file, rows[:4]))
    assert said(data(tiny_llama, file), other, TrainerFn.TESTING) == []


def test_other_rows_of_the_same_number(tiny_llama: Path, file: Path) -> None:
    before, rows = data(tiny_llama, file), json.loads(file.read_text())
    flip = {"the correct answer is true": "the correct answer is false"}
    flipped = [row | {"output": flip.get(row["output"], "the correct answer is true")} for row in rows]
    one = [*rows[:-1], rows[-1] | {"output": flipped[-1]["output"]}]
    for changed in (flipped, one, rows[::-1], [boolq_row(number) for number in range(8, 16)]):
        assert said(before, data(tiny_llama, rewritten(file, changed))) == [OTHER_SAMPLES]
    assert said(before, data(tiny_llama, file, template="plain")) == [OTHER_SAMPLES]


@pytest.mark.parametrize("options", [{"cutoff_len": 48}, {"train_on_inputs": True}])
def test_other_tokens_of_the_same_rows(tiny_llama: Path, file: Path, options: dict[str, Any]) -> None:
    before = data(tiny_llama, file, template="plain")
    assert said(before, data(tiny_llama, file, template="plain", **options)) == [OTHER_TOKENS]


def test_another_tokenizer(tiny_llama: Path, file: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    own = tokenizer_fingerprint(tokenizer)
    # how it is called does not count
    tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == own
    tokenizer.add_tokens(["unheard"])  # in no text, so that all ids stay
    shutil.copytree(tiny_llama, tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    assert said(data(tiny_llama, file), data(tmp_path / "more", file)) == [
        "the tokenizer is not the one of the checkpoint's run"
    ]
    tokenizer.eos_token = "<pad>"
    assert tokenizer_fingerprint(tokenizer) not in (
        own,
        tokenizer_fingerprint(AutoTokenizer.from_pretrained(tiny_llama)),
    )


def test_pairs_of_answers(tiny_llama: Path, tmp_path: Path) -> None:
    def pairs(*answers: tuple[str, str]) -> dict[str, str]:
        rows = [{"prompt": "is it cold?", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
        write_rows(tmp_path / "pairs.json", rows)
        made = PreferenceDataModule(str(tiny_llama), train_file=str(tmp_path / "pairs.json"), template="none")
        made.setup("fit")
        return made.state_dict()

    first = pairs(("yes", "no"), ("hot", "cold"))
    assert pairs(("yes", "no"), ("hot", "cold")) == first
    for changed in (pairs(("no", "yes"), ("hot", "cold")), pairs(("hot", "cold"), ("yes", "no"))):
        assert changed["samples"] != first["samples"]
        assert changed["tokens"] != first["tokens"]


def test_images_count_by_their_names() -> None:
    def sample(image: Any, row: Any = None) -> list[Any]:
        return [EncodedSample(Sample("a", "b", images=(image,), row=row), torch.ones(2), torch.ones(2), (4,))]

    first = fingerprint([sample("old/folder/1.jpg")])
    assert fingerprint([sample(Path("new/folder/1.jpg"), {"file": "moved"})]) == first
    assert fingerprint([sample("old/folder/2.jpg")])["samples"] != first["samples"]
    assert fingerprint([sample("old/folder/1.jpg")[0]._replace(image_tokens=(5,))])["samples"] != first["samples"]


def test_nothing_is_said_of_data_that_are_not_there(make_data: MakeData) -> None:
    assert make_data().state_dict() == {}
