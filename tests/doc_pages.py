"""What the pages of the documentation hold: blocks, the files that blocks are of, commands, and links."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "guides").glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"`([\w.-]+\.(?:ya?ml|jsonl?))`[^`\n]*:\s*$")
_BASH_OR_INLINE = re.compile(
    r"^```bash\n(.*?)^```|(?<!`)`((?:\.\.\. --|dora-lightning )[^`]+)`", re.DOTALL | re.MULTILINE
)
_COMMAND = re.compile(r"\bdora-lightning (.*)")


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str
    file: str | None
    """The file that the sentence before says it is, such as ``run.yaml`` in "`run.yaml`:"."""

    @property
    def commands(self) -> list[list[str]]:
        """The words of each call of ``dora-lightning``."""
        return commands_of(self.text) if self.language == "bash" else []


def blocks(page: Path) -> list[Block]:
    """All fenced blocks, in order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        named = _FILE.search(text[: match.start()].rstrip().rpartition("\n\n")[2])
        found.append(Block(match[1], match[2], named[1] if named else None))
    return found


def commands_of(text: str) -> list[list[str]]:
    """The words after each ``dora-lightning``, lines that end in a backslash joined."""
    lines = text.replace("\\\n", " ").split("\n")
    calls = [_COMMAND.search(part) for line in lines if not line.startswith("#") for part in line.split("&&")]
    return [shlex.split(call[1], comments=True) for call in calls if call]


def page_commands(page: Path) -> list[list[str]]:
    """The calls in ``bash`` blocks and in inline code, in order; ``... --option value`` is an override of a fit."""
    text = re.sub(r"^```(?!bash)\w*\n.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = []
    for match in re.finditer(
        r"^```bash\n(.*?)^```|(?<!`)`((?:\.\.\. --|dora-lightning )[^`]+)`", text, re.DOTALL | re.M
    ):
        code = match[1] or re.sub(r"^\.\.\. ", "dora-lightning fit ", match[2]).replace("\n", " ")
        found += commands_of(code)
    return found


def links(page: Path) -> list[str]:
    """Targets of the links that lead to files."""
    text = _BLOCK.sub("", page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in targets if not re.match(r"https?:|#|mailto:", target)]


def named_configs(page: Path) -> set[str]:
    """Paths in ``configs`` that the text names, as patterns."""
    found = re.findall(r"\bconfigs/[\w./*-]*\w\.yaml", page.read_text())
    return {re.sub(r"\{[^}]*\}", "*", path) for path in found}
