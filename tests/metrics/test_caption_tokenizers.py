"""Words of captions, against the Java tokenizer of the COCO evaluation where there is one."""

import random
import shutil
import sys
from pathlib import Path

import pytest
from caption_samples import caption

from dora_lightning.metrics import CIDErD, ptb_words, tokenize_captions

# caption -> words, as the Java tokenizer gave them and the COCO evaluation keeps them
TABLE = {
    "A man's dog can't sit.": "a man 's dog ca n't sit",
    "The dogs' bowl": "the dogs bowl",
    "they'll, we've; I'd I'm you're": "they 'll we 've i 'd i 'm you 're",
    "wouldn't've": "would n't 've",
    "cannot gonna gotta lemme gimme wanna 'tis 'twas": "can not gon na got ta lem me gim me wan na 't is 't was",
    "o'clock ma'am O'Neil's s'mores 'em '90s 90's": "o'clock ma'am o'neil 's s'mores 'em '90s 90 's",
    "y'all ann't i'am m'lady l'eau": "y' all ann t i am m lady l'eau",
    "pro- and anti-war, pre- and co-": "pro- and anti-war pre and co",
    "bldgs., cars. ; trucks.: end.": "bldgs. cars trucks. end",
    "a sign: \"STOP\" or 'GO'": "a sign stop or go",
    "it\u2019s \u201cquoted\u201d \u2014 fine\u2026": "it 's quoted fine",
    "(left) [mid] {right}": "-lrb- left -rrb- -lsb- mid -rsb- -lcb- right -rcb-",
    "yes,no;so a:b": "yes no so a b",
    "wow!!! what?! ok... a -- b": "wow !!! what ?! ok a b",
    "well-known 3-year-old T-shirt 3,000-meter": "well-known 3-year-old t-shirt 3,000-meter",
    "and/or w/ 1/2 24/7": "and/or w / 1/2 24/7",
    "$5.00 50% #1 #tag @home 5\xa2": "$ 5.00 50 % # 1 #tag @home 5 cents",
    "1 1/2 cups, 10\xbd cups": "1\xa01/2 cups 10 1/2 cups",
    "A&B a&b Q & A": "a&b a & b q & a",
    "10:30 a.m. 5pm U.S. e.g. Ph.D.": "10:30 a.m. 5pm u.s. e.g. ph.d.",
    "Mr. Smith of St. John Ave. etc.": "mr. smith of st. john ave. etc.",
    "no. 5 says no.": "no. 5 says no",
    "in Wash. they wash.": "in wash. they wash",
    "type B. The end": "type b the end",
    "J. F. Kennedy, option b.": "j. f. kennedy option b.",
    "a man.Another man": "a man.another man",
    "naïve café 日本": "naïve café 日本",
    "&amp; &lt;3 <b>": "& < 3 <b>",
    "": "",
    " . , ": "",
}
JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime")


@pytest.mark.parametrize("text", TABLE)
def test_table(text: str) -> None:
    assert ptb_words(text) == TABLE[text].split(" ") * (TABLE[text] != "")
    assert tokenize_captions([text]) == [ptb_words(text)]


@JAVA
def test_the_table_is_what_java_gives() -> None:
    pytest.importorskip("pycocoevalcap")
    words = tokenize_captions(list(TABLE), "java")
    assert [" ".join(one) for one in words] == list(TABLE.values())


@JAVA
def test_thousands_of_captions_are_split_as_by_java() -> None:
    pytest.importorskip("pycocoevalcap")
    chance = random.Random(0)
    captions = [caption(chance, hard=0.8) for _ in range(6000)]
    expected = tokenize_captions(captions, "java")
    assert [text for text, words in zip(captions, expected, strict=True) if ptb_words(text) != words] == []


@JAVA
def test_java_reads_any_script_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("LC_ALL", "C")
    assert tokenize_captions(["na\xefve caf\xe9 \u65e5\u672c"], "java") == [["na\xefve", "caf\xe9", "\u65e5\u672c"]]


@JAVA
def test_java_keeps_captions_apart_whatever_is_in_them() -> None:
    pytest.importorskip("pycocoevalcap")
    breaks = [f"a{sign}b" for sign in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"]
    captions = ["", "one\ntwo", *breaks, "\n", "a \ud800 b", "😀", "", "last."]
    words = tokenize_captions(captions, "java")
    assert len(words) == len(captions)
    assert words[:2] == [[], ["one", "two"]]
    assert words[-2:] == [[], ["last"]]
    assert tokenize_captions([], "java") == []


@JAVA
def test_the_coco_tokenizer_agrees(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    chance = random.Random(1)
    captions = [caption(chance, hard=0.5).encode("ascii", "ignore").decode() for _ in range(500)]
    words = tokenizer.PTBTokenizer().tokenize({0: [{"caption": text} for text in captions]})[0]
    assert [" ".join(one) for one in tokenize_captions(captions, "java")] == words


def test_a_function_of_ones_own_and_ascii_only() -> None:
    assert tokenize_captions(["A  b", ""], lambda text: text.split()) == [["A", "b"], []]
    assert tokenize_captions(["caf\xe9 \u65e5 x"], ascii_only=True) == [["caf", "x"]]
    assert tokenize_captions(["it\u2019s"], ascii_only=True) == [["it", "s"]]


def test_an_unknown_tokenizer() -> None:
    with pytest.raises(ValueError, match="unknown tokenizer 'penn'"):
        tokenize_captions([], "penn")


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_lightning.metrics.caption_tokenizers.find_spec", lambda name: None)


@pytest.mark.usefixtures("no_package")
def test_java_without_its_package() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install pycocoevalcap, or take 'ptb'"):
        CIDErD(tokenizer="java")


def test_java_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs a Java runtime on the PATH"):
        tokenize_captions([], "java")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for Java")
def test_java_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\ncat > /dev/null\necho no memory >&2\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RuntimeError, match=r"gave 0 lines for 1 captions, exit status 3: no memory"):
        tokenize_captions(["a"], "java")
