"""Figures are files that are there whole, and drawing them leaves the caller's matplotlib alone."""

from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from dora_lightning.plots import new_figure, save_figure


def test_a_figure_has_its_panels_and_becomes_a_file(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    figure, axes = new_figure(panels=4, columns=3, title="four")
    for axis in axes:
        axis.plot([0, 1], [0, 1])
    path = save_figure(figure, tmp_path / "four.png")
    assert len(axes) == 4
    with Image.open(path) as image:
        assert image.width > image.height
    assert dict(matplotlib.rcParams) == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_format_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    figure, _ = new_figure()
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(figure, tmp_path / "figure.nonsense")
    assert not list(tmp_path.iterdir())


def test_a_long_title_stays_within_the_figure(tmp_path: Path) -> None:
    figure, _ = new_figure(title="A title of so many words that one line of a figure of this size cannot hold them all")
    save_figure(figure, tmp_path / "long.png")
    box = figure.texts[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
