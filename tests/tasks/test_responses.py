"""Responses to instructions: ROUGE-L worked by hand, and a whole run on a tiny model."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from tiny import MakeBackbone, MakeTrainer

from datamodules import InstructionDataModule
from dora_lightning.data import Sample
from tasks import InstructionTuning


def test_rouge_l_worked_by_hand() -> None:
    task = InstructionTuning()
    references = ["the cat sat down", "a dog", "it is so"]
    samples = [Sample("...", text, references=(text,), source="alpaca") for text in references]
    task.update(samples, ["the cat sat", "nothing of it", " "])
    # precision 3/3, recall 3/4: F1 = 6/7
    assert [row["rouge_l"] for row in task.records()] == pytest.approx([6 / 7, 0, 0])
    results = {name: float(value) for name, value in task.compute().items()}
    assert results == pytest.approx(
        {"alpaca/rouge_l": 2 / 7, "alpaca/blank": 1 / 3, "mean/rouge_l": 2 / 7, "mean/blank": 1 / 3}
    )
    console = Console(file=io.StringIO(), width=80)
    console.print(task.table(task.compute()))
    assert "28.6" in console.file.getvalue()
    assert "33.3" in console.file.getvalue()


def test_how_responses_are_made() -> None:
    assert InstructionTuning(32).generation == {"max_new_tokens": 32, "num_beams": 1, "do_sample": False}
    assert InstructionTuning(temperature=0.7).generation["temperature"] == 0.7
    with pytest.raises(ValueError, match=r"0 with a beam search, found 0\.7 with 4 beams"):
        InstructionTuning(temperature=0.7, num_beams=4)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_run_logs_loss_and_perplexity_and_writes_responses(
    make_backbone: MakeBackbone, make_trainer: MakeTrainer, tiny_llama: Path, tmp_path: Path
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    rows = [
        {"instruction": f"is it {n} cold or hot?", "output": f"it is {'hot' if n % 2 else 'cold'}"} for n in range(32)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = InstructionDataModule(
        str(tiny_llama),
        str(tmp_path / "rows.json"),
        val_size=6,
        template="plain",
        batch_size=2,
        cutoff_len=64,
        packing_len=96,
    )
    module = make_backbone(task=InstructionTuning(max_new_tokens=4))
    trainer = make_trainer(max_epochs=4, log_every_n_steps=1, logger=CSVLogger(tmp_path, "", ""))
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.validate(module, datamodule=data, verbose=False)
    for logged in (before, after):
        assert logged["val/perplexity"] == pytest.approx(math.exp(logged["val/loss"]), rel=1e-5)
    assert after["val/loss"] < before["val/loss"] - 0.5
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert set(tested) == {f"test/{part}/{name}" for part in ("instructions", "mean") for name in ("rouge_l", "blank")}
    written = [json.loads(line) for line in (tmp_path / "test_predictions.jsonl").read_text().splitlines()]
    assert len(written) == 6
    assert {"instruction", "output", "output_pred", "rouge_l"} <= set(written[0])
