"""How captions are taken apart into words before they are compared."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from dora_lightning.metrics.ptb_words import PTB_PUNCTUATION, ptb_words

Tokenizer = Callable[[str], Sequence[str]]
"""A function from a caption to its words."""

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_LINE_BREAK = re.compile("[\n\r\v\f\x85\u2028\u2029]")
_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"


def tokenize_captions(
    captions: Sequence[str], tokenizer: str | Tokenizer = "ptb", ascii_only: bool = False
) -> list[list[str]]:
    """The words of each caption.

    Args:
        captions: texts.
        tokenizer: ``"ptb"`` for lower-cased words without punctuation, as the COCO evaluation splits them, in Python
            (:func:`~dora_lightning.metrics.ptb_words`); ``"java"`` for the program of the COCO evaluation itself,
            which the package ``pycocoevalcap`` carries and a Java runtime runs; or a function from a caption to its
            words.
        ascii_only: put a space for each character that is not ASCII first, as the VALUE benchmark does.

    Raises:
        ValueError: an unknown tokenizer.
        ModuleNotFoundError: ``"java"`` without ``pycocoevalcap``.
        FileNotFoundError: ``"java"`` without a Java runtime.

    >>> tokenize_captions(["The dog's café, isn't it?"])
    [['the', 'dog', "'s", 'café', 'is', "n't", 'it']]
    >>> tokenize_captions(["The dog's café, isn't it?"], str.split, ascii_only=True)
    [['The', "dog's", 'caf', ',', "isn't", 'it?']]
    """
    if ascii_only:
        captions = [_NOT_ASCII.sub(" ", caption) for caption in captions]
    if tokenizer == "java":
        return _java_words(captions)
    one = ptb_words if tokenizer == "ptb" else tokenizer
    if isinstance(one, str):
        raise ValueError(f"unknown tokenizer {one!r}; there are ptb, java and functions of your own")
    return [list(one(caption)) for caption in captions]


def _java_words(captions: Sequence[str]) -> list[list[str]]:
    command = _java_command()
    if not captions:
        return []
    # a caption is a line, whatever Java takes for the end of one
    text = "".join(f"{_LINE_BREAK.sub(' ', caption)}\n" for caption in captions)
    run = subprocess.run(command, input=text.encode(errors="replace"), capture_output=True, check=False)
    lines = run.stdout.decode().split("\n")[:-1]
    if run.returncode != 0 or len(lines) != len(captions):
        raise RuntimeError(
            f"the Java tokenizer gave {len(lines)} lines for {len(captions)} captions, exit status {run.returncode}:"
            f" {run.stderr.decode(errors='replace')[-2000:]}"
        )
    return [[word for word in line.split(" ") if word and word not in PTB_PUNCTUATION] for line in lines]


def _java_command() -> list[str]:
    # the file is looked for without importing the package
    package = find_spec("pycocoevalcap")
    folders = (package.submodule_search_locations if package else None) or []
    jar = next((path for path in (Path(folder) / _JAR for folder in folders) if path.is_file()), None)
    if jar is None:
        raise ModuleNotFoundError(
            "tokenizer='java' runs the tokenizer that pycocoevalcap carries: pip install pycocoevalcap, or take 'ptb'"
        )
    java = shutil.which("java")
    if java is None:
        raise FileNotFoundError("tokenizer='java' needs a Java runtime on the PATH; install one, or take 'ptb'")
    options = ["-preserveLines", "-lowerCase"]
    return [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
