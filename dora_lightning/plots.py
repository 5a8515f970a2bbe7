"""Figures of reports: one look for all of them, and files that are there whole or not at all.

matplotlib is an optional extra (``plots``) and is imported when the first figure is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_lightning.files import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""One colour for each series, told apart by colour-blind readers too (Okabe and Ito)."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One marker for each series, for those who print in grey."""

# Any: matplotlib types the names of its settings as literals
_STYLE: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}

_LETTERS_PER_INCH = 10  # of a title


def can_plot() -> bool:
    """Whether matplotlib is there: reports that plot where they can ask first."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(
    panels: int = 1, columns: int = 3, size: tuple[float, float] = (4.2, 3.2), title: str = ""
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with ``panels`` axes, at most ``columns`` in a row.

    Drawn without a display, and apart from the figures of whoever calls: nothing global is changed.

    Args:
        panels: how many axes.
        columns: most of them in a row.
        size: width and height of one, in inches.
        title: above all of them, in as many lines as it takes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install dora-lightning[plots]") from error
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    with matplotlib.rc_context(_STYLE):
        lines = textwrap.wrap(title, max(20, int(_LETTERS_PER_INCH * size[0] * columns)))
        figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.25 * len(lines)), layout="constrained")
        if lines:
            figure.suptitle("\n".join(lines))
        return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(panels)]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure as its suffix says (``.png``, ``.svg``, ``.pdf``).

    Raises:
        ValueError: matplotlib writes no such format; it names those it does.
    """
    import matplotlib

    file = BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format=path.suffix.lstrip(".") or "png")
    write_bytes_atomically(path, file.getvalue())
    return path
