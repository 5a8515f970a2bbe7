"""Answers to a file of prompts, kept as they are made: a run that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_lightning.files import json_lines, write_bytes_atomically
from dora_lightning.files.growing import GrowingFile, check_writable
from dora_lightning.model_cache import digest, file_stamp

_STAMPED = (".safetensors", ".json", ".jinja", ".ckpt", ".gguf")


class KeptAnswers:
    """Answers on their way to ``output``, which is written as a whole when all are there.

    Until then they are in ``{output}.unfinished`` beside it, after a line that says what makes them.

    Args:
        output: JSONL file of rows ``{"prompt", "output"}``.
        prompts: what is asked.
        made_by: model and options, in plain containers, that the answers depend on.

    Raises:
        OSError: ``output`` cannot be written.
        ValueError: there are unfinished answers of another run.
    """

    def __init__(self, output: Path, prompts: Sequence[str], made_by: Mapping[str, Any]) -> None:
        check_writable(output)
        self.output = output
        self.prompts = prompts
        self.answers: list[str] = []
        """The answers to the first prompts, as many as there are."""
        self._made_by = json.loads(json.dumps({**made_by, "prompts": digest(*map(repr, prompts))}))
        self._file = GrowingFile(output.with_name(f"{output.name}.unfinished"))
        if self._file.path.is_file():
            self._go_on()

    def add(self, answers: Sequence[str]) -> None:
        """Keep the answers to the next prompts."""
        first = len(self.answers)
        rows = [_row(*pair) for pair in zip(self.prompts[first : first + len(answers)], answers, strict=True)]
        self._file.append(*([] if first else [{"made_by": self._made_by}]), *rows)
        self.answers += answers

    def finish(self) -> None:
        """Write the output, and remove what was kept on the way to it."""
        rows = [_row(*pair) for pair in zip(self.prompts, self.answers, strict=True)]
        write_bytes_atomically(self.output, json_lines(rows))
        self._file.path.unlink(missing_ok=True)

    def _go_on(self) -> None:
        path = self._file.path
        way_out = f"finish that run, or remove {path}"
        try:
            head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            made_by = dict(head["made_by"])
            answers = [(row["prompt"], row["output"]) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no unfinished answers ({error}); remove it") from error
        for name in [*self._made_by, *made_by]:
            if made_by.get(name) != self._made_by.get(name):
                here = f"{name} is {made_by.get(name)!r:.80} there, {self._made_by.get(name)!r:.80} here"
                raise ValueError(f"{path} holds {len(answers)} answers of another run ({here}): {way_out}")
        if [prompt for prompt, _ in answers] != list(self.prompts[: len(answers)]):
            raise ValueError(f"{path} holds answers to other prompts: {way_out}")
        self.answers = [answer for _, answer in answers]


def model_stamp(model: str) -> str:
    """What a model's name stands for now: a file or folder that was changed is another model."""
    path = Path(model).expanduser()
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    return digest(model, *(file_stamp(file) for file in files if file.suffix in _STAMPED))


def _row(prompt: str, answer: str) -> dict[str, str]:
    return {"prompt": prompt, "output": answer}
