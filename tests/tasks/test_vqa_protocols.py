"""Each benchmark reads and scores answers as its own code does, and the variants differ where they should."""

import pickle
from typing import Any

import pytest

from dora_lightning.data import Sample
from tasks.vqa_protocols import PROTOCOLS, benchmark_of, select_variants

CHOICES = {"choices": ["iron", "wood", "glass"]}
OPTIONS = {"options": {"A": "a boat", "B": "a hat"}}


def judge(benchmark: str, variant: str, text: str, references: tuple[str, ...], **row: Any) -> tuple[str, float]:
    protocol = PROTOCOLS[benchmark][variant]
    sample = Sample("...", "...", references=references, source=benchmark, row=row)
    answer = protocol.read(text, sample)
    return answer, round(float(protocol.score([answer], [references])), 4)


DOGS = ("2",) * 2 + ("two dogs",) * 3 + ("dogs",) * 5


@pytest.mark.parametrize(
    ("benchmark", "variant", "text", "references", "expected"),
    [
        # of 10 people 2 said it, 2/10 of them see 1 other and 8/10 see 2: .2 / 3 + .8 * 2 / 3 = .6
        ("vqav2", "official", " Two.\n", DOGS, ("Two.", 0.6)),
        ("vizwiz", "official", "Two", DOGS, ("Two", 0.6)),
        ("textvqa", "m4c", "two", DOGS, ("two", 0.6)),
        ("vqav2", "simplified", "Two", DOGS, ("Two", 0.6667)),
        # people who agree are compared with as they are
        ("vqav2", "official", "Cat", ("cat",) * 10, ("Cat", 0.0)),
        ("vqav2", "lmms", "Cat", ("cat",) * 10, ("Cat", 1.0)),
        ("textvqa", "m4c", "Cat", ("cat",) * 10, ("Cat", 1.0)),
        ("gqa", "gqa", "Yes.", ("yes",), ("Yes.", 1.0)),
        ("gqa", "gqa", "yes!", ("yes",), ("yes!", 0.0)),
        ("gqa", "lmms_gqa", "yes!", ("yes",), ("yes!", 1.0)),
        # VL-BART's: people's answers lose their punctuation alone, the model's is normalised as ever
        ("vqav2", "vl_t5", "two dogs", ("2, dogs",) * 9 + ("cat",), ("two dogs", 1.0)),
        ("vqav2", "vl_t5", "two dogs", ("two dogs",) * 9 + ("cat",), ("two dogs", 0.0)),
        ("vqav2", "official", "two dogs", ("two dogs",) * 9 + ("cat",), ("two dogs", 1.0)),
        ("vqav2", "vl_t5", "Cat", ("Cat",) * 9 + ("dog",), ("Cat", 0.0)),
        ("vqav2", "official", "Cat", ("Cat",) * 9 + ("dog",), ("Cat", 1.0)),
        ("gqa", "label", " left\n", ("left", "right"), ("left", 1.0)),
        ("gqa", "label", "right", ("left", "right"), ("right", 1.0)),
        ("gqa", "label", "Left", ("left",), ("Left", 0.0)),
        ("gqa", "label", "left.", ("left",), ("left.", 0.0)),
        ("moving_shapes", "normalized", "To the Left.", ("to the left",), ("To the Left.", 1.0)),
        ("moving_shapes", "normalized", "right", ("left",), ("right", 0.0)),
        ("easy_vqa", "normalized", " A Circle.", ("circle",), ("A Circle.", 1.0)),
        ("easy_vqa", "normalized", "circle or square", ("circle",), ("circle or square", 0.0)),
        ("easy_vqa", "gqa", "A circle", ("circle",), ("A circle", 0.0)),
        ("other", "normalized", "The cat", ("dog", "cat"), ("The cat", 1.0)),  # any reference
        ("pope", "llava", "There is no dog.", ("no",), ("no", 1.0)),
        ("pope", "llava", "Maybe", ("no",), ("yes", 0.0)),
        ("pope", "llava", "", ("yes",), ("yes", 1.0)),  # POPE's own code takes all but a negation for yes
    ],
)
def test_short_answers(
    benchmark: str, variant: str, text: str, references: tuple[str, ...], expected: tuple[str, float]
) -> None:
    assert judge(benchmark, variant, text, references) == expected


@pytest.mark.parametrize(
    ("benchmark", "variant", "text", "row", "expected"),
    [
        ("scienceqa", "llava", " B\n", CHOICES, "B"),
        ("scienceqa", "llava", "The answer is C.", CHOICES, "C"),
        ("scienceqa", "llava", "D", CHOICES, ""),  # there are three choices
        ("scienceqa", "llava", "b", CHOICES, ""),
        ("scienceqa", "lmms", "b", CHOICES, "B"),
        ("scienceqa", "vlmevalkit", "It is made of wood", CHOICES, "B"),
        ("mmbench", "vlmevalkit", "(B)", OPTIONS, "B"),
        ("mmbench", "vlmevalkit", "a boat, I think", OPTIONS, "A"),
        ("mmbench", "llava", "a boat, I think", OPTIONS, ""),
    ],
)
def test_letters(benchmark: str, variant: str, text: str, row: dict[str, Any], expected: str) -> None:
    assert judge(benchmark, variant, text, ("B",), **row) == (expected, float(expected == "B"))


def test_the_protocols_of_llava_are_the_defaults() -> None:
    assert select_variants({}) == {
        "vqav2": "official",
        "vizwiz": "official",
        "textvqa": "m4c",
        "gqa": "gqa",
        "scienceqa": "llava",
        "mmbench": "vlmevalkit",
        "pope": "llava",
        "easy_vqa": "normalized",
        "moving_shapes": "normalized",
        "other": "normalized",
    }
    assert select_variants({"vqav2": "lmms"})["vqav2"] == "lmms"
    assert pickle.loads(pickle.dumps(select_variants({}))) == select_variants({})


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"vqa": "lmms"}, r"variants: no benchmark 'vqa', there are vqav2, vizwiz, .*, other"),
        ({"pope_random": "llava"}, "no benchmark 'pope_random'"),
        ({"vqav2": "gqa"}, "vqav2 is judged by one of official, m4c, lmms, vl_t5, simplified, got 'gqa'"),
    ],
)
def test_unknown_names_are_errors(variants: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_variants(variants)


def test_sources_of_a_benchmark() -> None:
    assert {benchmark_of(f"pope_{split}") for split in ("random", "popular", "adversarial")} == {"pope"}
    assert {benchmark_of(f"easy_vqa_{kind}") for kind in ("shape", "color", "yes_no")} == {"easy_vqa"}
    assert benchmark_of("gqa_of_mine") == "other"


def test_letters_need_their_choices() -> None:
    with pytest.raises(ValueError, match="mmbench: the row of a question with letters needs 'choices' or 'options'"):
        judge("mmbench", "vlmevalkit", "A", ("A",))
