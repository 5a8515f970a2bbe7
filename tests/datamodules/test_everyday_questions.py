from collections import Counter

import pytest

from datamodules.everyday_questions import CHOICES, KINDS, SIZES, everyday_questions, things, with_article

SPLITS = ("train", "test")


def words(names):
    return {word for name in names for word in name.split()} - {"of"}


def test_no_thing_is_in_both_splits_even_in_another_kind_of_question() -> None:
    train = set().union(*things("train").values())
    test = set().union(*things("test").values())
    assert not train & test
    # nor is a test thing another sort of a training thing, as a kitchen clock is of a clock
    assert not words(train) & words(test)


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_is_about_things_of_its_split(split) -> None:
    named = things(split)
    other = things("test" if split == "train" else "train")
    for row in everyday_questions(split):
        asked = f" {row['question']} ".replace("?", " ").replace(",", " ")
        assert any(f" {with_article(name)} " in asked for name in named[row["kind"]]), row
        assert not any(f" {with_article(name)} " in asked for names in other.values() for name in names), row


@pytest.mark.parametrize("split", SPLITS)
def test_no_question_is_asked_twice_and_none_with_four_options_names_its_answer(split) -> None:
    for row in everyday_questions(split):
        if len(row["options"]) == 4:
            assert row["answer"].split()[0] not in row["question"].split(), row
    questions = [row["question"] for row in everyday_questions(split)]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", range(3))
def test_options_are_distinct_and_one_of_them_is_the_answer(split, seed) -> None:
    for row in everyday_questions(split, seed=seed):
        assert set(row) == {"kind", "question", "options", "answer"}
        assert len(row["options"]) == (2 if row["kind"] in ("size", "which one") else 4)
        assert len(set(row["options"])) == len(row["options"])
        assert row["options"].count(row["answer"]) == 1
        assert all(option == option.strip() for option in row["options"])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_stands_in_each_position_equally_often(split, kind) -> None:
    rows = [row for row in everyday_questions(split, seed=3) if row["kind"] == kind]
    positions = Counter(row["options"].index(row["answer"]) for row in rows)
    assert set(positions.values()) == {len(rows) // len(rows[0]["options"])}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["use", "material", "colour"])
def test_every_answer_is_right_and_offered_wrongly_equally_often(split, kind) -> None:
    rows = [row for row in everyday_questions(split) if row["kind"] == kind]
    right = Counter(row["answer"] for row in rows)
    offered = Counter(option for row in rows for option in row["options"])
    assert len(set(right.values())) == 1
    assert len(set(offered.values())) == 1


@pytest.mark.parametrize("kind", ["size", "which one"])
def test_comparisons_name_the_answer_first_every_other_time(kind) -> None:
    for row in everyday_questions("test"):
        if row["kind"] == kind:
            first, second = row["options"]
            assert row["question"].endswith(f"{first} or {second}?")


@pytest.mark.parametrize(("kind", "answers"), [(kind, list(answers)) for kind, _, answers in CHOICES])
def test_arguable_answers_are_not_offered_against_each_other(kind, answers) -> None:
    for row in everyday_questions("train") + everyday_questions("test"):
        if row["kind"] == kind:
            steps = {answers.index(option) - answers.index(row["answer"]) for option in row["options"]} - {0}
            assert not {step % len(answers) for step in steps} & {1, len(answers) - 1}, row


@pytest.mark.parametrize("split", SPLITS)
def test_the_bigger_thing_is_two_rows_or_more_above_the_smaller(split) -> None:
    column = SPLITS.index(split)
    ranks = {with_article(name): rank for rank, row in enumerate(SIZES) for name in row[column].split(", ")}
    for row in everyday_questions(split, seed=5):
        if row["kind"] == "size":
            smaller = next(option for option in row["options"] if option != row["answer"])
            assert ranks[row["answer"]] >= ranks[smaller] + 2


@pytest.mark.parametrize(("split", "size"), [("train", 300), ("test", 180)])
def test_all_questions_are_returned_without_a_size(split, size) -> None:
    assert Counter(row["kind"] for row in everyday_questions(split)) == dict.fromkeys(KINDS, size // 5)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [0, 1, 7, 100, 180])
def test_any_size_has_as_many_of_one_kind_as_of_another(split, size) -> None:
    rows = everyday_questions(split, size=size)
    counts = Counter(row["kind"] for row in rows)
    assert len(rows) == size
    assert all(size // 5 <= counts[kind] <= size // 5 + 1 for kind in KINDS)


@pytest.mark.parametrize("size", [-1, 181])
def test_sizes_beyond_the_questions_there_are_raise(size) -> None:
    with pytest.raises(ValueError, match="180 questions"):
        everyday_questions("test", size=size)


def test_an_unknown_split_raises() -> None:
    with pytest.raises(ValueError, match="split"):
        everyday_questions("validation")


def test_the_seed_alone_decides() -> None:
    assert everyday_questions("train") == everyday_questions("train", seed=0)
    assert everyday_questions("train", seed=1) == everyday_questions("train", seed=1)
    assert everyday_questions("train", seed=1) != everyday_questions("train", seed=0)


def test_drawn_questions_stay_the_same() -> None:
    assert [row["question"] for row in everyday_questions("test", size=5)] == [
        "Which can fly, an owl or a snail?",
        "What colour is a bowl of custard?",
        "Which is bigger, a bus or a postage stamp?",
        "What is a machete used for?",
        "What is a safety pin made of?",
    ]
