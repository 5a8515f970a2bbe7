"""Sphinx makes a site of these pages and of the docstrings: ``sphinx-build -W --keep-going -b html docs site``."""

import re
import sys
import warnings
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the recipes, which are no part of the installed package

import dora_lightning  # noqa: E402  # of the clone that these pages are in

warnings.filterwarnings("ignore")  # of the libraries that autodoc imports; Sphinx's own warnings are no Python warnings

project = "dora-lightning"
author = "the dora-lightning contributors"
release = version = dora_lightning.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["measured"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"dora-lightning {release}"
html_show_copyright = False
html_copy_source = False

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True  # defaults as they are written, not as they are printed
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Variants", "params_style")]
python_maximum_signature_line_length = 100

API = Path(__file__).parent / "api"


def readme_beginning() -> str:
    """The README down to its first section, its links made relative to this folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    return re.sub(r"\]\((?!https?:|#)(docs/)?", lambda found: "](" if found[1] else "](../", text)


def other_packages() -> str:
    """An entry for every package of the library with a public interface that no page of ``api`` names."""
    named = "".join(page.read_text(encoding="utf-8") for page in sorted(API.glob("*.md")))
    entries = []
    for init in sorted((ROOT / "dora_lightning").glob("*/__init__.py")):
        name = f"dora_lightning.{init.parent.name}"
        if "__all__" in init.read_text(encoding="utf-8") and f"automodule:: {name}\n" not in named:
            entries.append(f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n")
    return "\n".join(entries)


def other_guides() -> str:
    """The guides that ``index.md`` does not name."""
    named = (API.parent / "index.md").read_text(encoding="utf-8")
    pages = sorted(f"guides/{page.stem}" for page in (API.parent / "guides").glob("*.md"))
    return "\n".join(page for page in pages if f"{page}\n" not in named)


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Put what is read from elsewhere into the pages that ask for it."""
    parts = {"README": readme_beginning, "other packages": other_packages, "other guides": other_guides}
    for name, text in parts.items():
        if (mark := f"<!-- {name} -->") in source[0]:
            source[0] = source[0].replace(mark, text())


def setup(app: Sphinx) -> None:
    """Connect."""
    app.connect("source-read", fill_in)
