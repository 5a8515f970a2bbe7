import pickle
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import HalfPrecision

from dora_lightning.data import Sample


@dataclass(frozen=True)
class FrozenImage:
    """An image source as somebody's own datamodule may have it."""

    name: str


def a_sample(**changes: Any) -> Sample:
    images = (FrozenImage("a"), b"\x89PNG" * 1000)
    return Sample("Q:", " A", images=images, source="own", row={"id": FrozenImage("b")})._replace(**changes)


def test_a_sample_goes_to_the_device_as_it_is() -> None:
    sample = a_sample()
    batch = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "samples": [sample]}
    # what the loops of a Trainer do before each step, in this order
    converted = HalfPrecision("bf16-true").convert_input(batch)
    moved = move_data_to_device(converted, torch.device("meta"))
    assert moved["samples"][0] is sample
    assert moved["input_ids"].is_meta


def test_samples_are_equal_by_their_fields_and_survive_pickling() -> None:
    sample = a_sample()
    assert sample == a_sample() == pickle.loads(pickle.dumps(sample))
    for field, value in {"prompt": "q", "options": ("A",), "row": None, "answered": ((0, 1),)}.items():
        changed = sample._replace(**{field: value})
        assert changed != sample
        assert getattr(changed, field) == value
    assert sample != tuple(a_sample()._fields().values())
    assert "prompt='Q:'" in repr(sample)
    assert Sample("a", "b") == Sample("a", "b", (), (), (), "", None, ())
