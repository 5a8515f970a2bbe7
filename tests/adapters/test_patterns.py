"""Patterns for module names: as Python matches them, and never for long."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dora_lightning import AdapterConfig, inject_adapters
from dora_lightning.adapters import patterns
from dora_lightning.adapters.config import by_pattern
from dora_lightning.adapters.patterns import matches

NAMES = ["model.layers.10.self_attn.q_proj", "layers.0.mlp.up_proj", "lm_head", "a.b", "aab", "abab", "", "A1_é"]
ORDINARY = [
    r".*\.(q|v)_proj", "lm_head", r"model\.layers\.\d+\..*_proj", r"(?!(?:model|head)\.).*", r"(?:.*\.)?up_proj|a\.b",
    r"\w+", r"[^.]+", r"[a-z0-9_.]*(?<!up)_proj", r"^lm_head$", r".*\b10\b.*", r".*\B_proj",
    "(?i:LM_HEAD)", r"\D*\S\W?",
]  # fmt: skip
EXPENSIVE = [
    r"(\w+\.)*q_proj",
    "(a+)+b",
    "(a|ab)*",
    "(a?){3,}b",
    "(?:(?:a*)*)*b",
    ".*.*.*.*.*.*b",
    "(a|a)*?b",
    "((?=a)a|b)+",
]


@pytest.mark.parametrize("pattern", ORDINARY + EXPENSIVE)
@pytest.mark.parametrize("few", [patterns._FEW, 0])
def test_both_ways_of_matching_are_pythons(pattern: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_FEW", few)
    patterns._parsed.cache_clear()
    for name in NAMES:
        if "?i" not in pattern or few:
            assert matches(pattern, name) == (re.fullmatch(pattern, name) is not None), name
    patterns._parsed.cache_clear()


@given(st.recursive(
    st.sampled_from(["a", "b", "[ab]", ".", "[^a]", r"\w", r"\b", "^", "$"]),
    lambda parts: st.one_of(
        st.tuples(parts, parts).map("".join),
        st.tuples(parts, parts).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(parts, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
        parts.map(lambda part: f"(?={part})"),
        parts.map(lambda part: f"(?!{part})"),
    ),
    max_leaves=6,
), st.text("ab.", max_size=6))  # fmt: skip
def test_sets_of_positions_give_pythons_answer(pattern: str, name: str) -> None:
    parsed = patterns.parser.parse(pattern)
    found = len(name) in patterns._Positions(name).after(parsed, frozenset([0]))
    assert found == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize("pattern", [*EXPENSIVE, r"(.*)*\.x", "(a*)*(b*)*c", "(?:a?){40}a{40}" + "a?" * 40 + "b"])
def test_no_pattern_takes_long(pattern: str) -> None:
    """Python's engine tries each way of matching, of which some of these have more than 2**60."""
    assert not matches(pattern, "a" * 200 + "!")
    model = nn.ModuleDict({"a" * 60: nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="matches no module"):
        inject_adapters(model, AdapterConfig(target_modules=f"x{pattern}"))
    assert by_pattern("a" * 60, {f"{pattern}!": 1}, 2) == 2


@pytest.mark.parametrize("pattern", [r"(a+)+\1b", "(?i)(a+)+b", "(?i:(a+))+b", "(a)?(?(1)(a+)+b|c)"])
def test_what_neither_way_can_match_in_time_is_named(pattern: str) -> None:
    with pytest.raises(ValueError, match="could take exponentially long: write it without repeats inside of repeats"):
        matches(pattern, "a" * 60)


def test_what_is_quick_may_have_any_part() -> None:
    assert matches(r"(a)\1", "aa")
    assert matches("(?i)A.*", "ab")


@pytest.mark.parametrize("pattern", ["(" * 5000 + "a" + ")" * 5000, "a{99999999999999}", "(a"])
def test_what_is_no_pattern_is_named(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target_modules: .* is not a regular expression"):
        AdapterConfig(target_modules=pattern)
