"""Targets of VL-BART's batches: what they are drawn by, how long they are, and what they weigh."""

from typing import Any

import torch

from datamodules.vl_bart.encoding import AskedCollator, AskedDataset, encode_asked
from datamodules.vl_bart.records import Asked
from dora_lightning.open_clip_tower import CLIP_MEAN, CLIP_STD
from dora_lightning.vl_bart.parts import word_tokenizer

TOKENIZER = word_tokenizer(["red", "blue"])


class Nothing:
    """Features of whatever is asked for."""

    from_features = True
    of_videos = False

    def features(self, name: str) -> torch.Tensor:
        return torch.zeros(2, 3)


def batch_of(rows: list[Asked], seed: int = 0, draw: bool = True, together: bool = False) -> dict[str, Any]:
    dataset = AskedDataset(encode_asked(rows, TOKENIZER), together)
    visuals: Any = {"x": Nothing()}
    collator = AskedCollator(TOKENIZER, visuals, None, CLIP_MEAN, CLIP_STD, 100, draw, seed)
    return collator(dataset[list(range(len(dataset)))])


def texts(batch: dict[str, Any]) -> list[str]:
    return [TOKENIZER.decode([t for t in row if t >= 0], skip_special_tokens=True) for row in batch["labels"].tolist()]


def test_rows_that_are_drawn_together_draw_targets_of_their_own() -> None:
    rows = [Asked("x", ("a",), "red?", answers=(("red", 1.0), ("blue", 1.0)))] * 40
    found = texts(batch_of(rows, together=True))
    assert 8 < found.count("red") < 32
    assert found == texts(batch_of(rows, together=True))
    assert found != texts(batch_of(rows, seed=1, together=True))


def test_without_drawing_the_best_target_is_taken() -> None:
    rows = [Asked("x", ("a",), "red?", answers=(("red", 0.3), ("blue", 0.6)))] * 20
    assert texts(batch_of(rows, draw=False)) == ["blue"] * 20


def test_a_target_s_length_is_limited() -> None:
    row = Asked("x", ("a",), "red?", answers=(("red red red red", 1.0),), max_target_tokens=4)
    (labels,) = batch_of([row])["labels"].tolist()
    assert TOKENIZER.convert_ids_to_tokens(labels) == ["<s>", "red", "Ġred", "</s>"]


def test_what_a_row_weighs() -> None:
    row = Asked("x", ("a",), "red?", answers=(("red", 0.3),))
    assert "row_weights" not in batch_of([row])
    assert batch_of([row._replace(mean_by_sample=True)])["row_weights"].tolist() == [1.0]
    weighted = batch_of([row._replace(mean_by_sample=True, weighted=True)])
    torch.testing.assert_close(weighted["row_weights"], torch.tensor([0.3]))
