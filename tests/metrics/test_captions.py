"""CIDEr-D, BLEU and ROUGE-L of captions against pycocoevalcap's, and the metrics over them.

The oracle gets words parted by spaces, as the metrics do with ``str.split``; how words are split is tested elsewhere.
"""

import random

import pytest
import torch
from caption_samples import samples
from torchmetrics import MetricCollection

from dora_lightning.metrics import CaptionScores, CIDErD, caption_scores, cider_d, coco_bleu, coco_rouge_l

pytest.importorskip("pycocoevalcap")

# what a metric says that is read before anything was added
nothing_seen = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before")

TOLERANCE = 1e-6


def coco(candidates: list[str], references: list[list[str]]) -> dict[str, tuple[list[float], torch.Tensor]]:
    """The COCO evaluation's numbers: of all samples, and of each [samples, numbers]."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    people = dict(enumerate(references))
    given = {index: [text] for index, text in enumerate(candidates)}
    cider, ciders = Cider().compute_score(people, given)
    bleu, bleus = Bleu().compute_score(people, given, verbose=0)
    rouge, rouges = Rouge().compute_score(people, given)
    return {
        "cider_d": ([float(cider)], torch.tensor(ciders.tolist()).double().unsqueeze(1)),
        "bleu": (list(bleu), torch.tensor(bleus, dtype=torch.float64).T),
        "rouge_l": ([float(rouge)], torch.tensor(rouges.tolist()).double().unsqueeze(1)),
    }


def ours(candidates: list[str], references: list[list[str]]) -> dict[str, tuple[list[float], torch.Tensor]]:
    scores = {}
    for name, function in {"cider_d": cider_d, "bleu": coco_bleu, "rouge_l": coco_rouge_l}.items():
        corpus, each = function(candidates, references, tokenizer=str.split)
        assert each.dtype == torch.float64
        scores[name] = (corpus.reshape(-1).tolist(), each.reshape(len(candidates), -1))
    return scores


def assert_same(candidates: list[str], references: list[list[str]]) -> None:
    expected, got = coco(candidates, references), ours(candidates, references)
    for name, (corpus, each) in expected.items():
        assert got[name][0] == pytest.approx(corpus, abs=TOLERANCE), name
        torch.testing.assert_close(got[name][1], each, atol=TOLERANCE, rtol=0, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("seed", [0, 1])
def test_thousands_of_captions(seed: int) -> None:
    candidates, references = samples(2500, seed=seed)
    assert_same(candidates, references)


def test_hundreds_of_small_sets_of_few_words() -> None:
    """Where ties, repeated n-grams, words in every sample, texts too short for an n-gram and empty ones abound."""
    chance = random.Random(0)

    def text(least: int) -> str:
        return " ".join(chance.choice("abcd") for _ in range(chance.randint(least, 7)))

    for _ in range(300):
        size = chance.randint(1, 4)
        # pycocoevalcap needs a word in some reference
        references = [[text(index == 0) for index in range(chance.randint(1, 4))] for _ in range(size)]
        assert_same([text(0) for _ in range(size)], references)


EDGES: dict[str, tuple[list[str], list[list[str]]]] = {
    "an empty caption": (["", "a b c d e"], [["a cat"], ["a b c d e", "a b"]]),
    "an empty caption against an empty reference": (["", "a b"], [["", "x"], ["a b"]]),
    "one reference each": (["a cat on a mat", "a dog"], [["a cat on the mat"], ["the dog runs"]]),
    "repeated n-grams": (["a cat a cat a cat a cat", "x y x y"], [["a cat a cat"], ["x y z", "x y x y x"]]),
    "a single image": (["a cat on a mat"], [["a cat on a mat", "a cat"]]),
    "one word": (["cat", "dog"], [["cat"], ["dog", "cat"]]),
    "nothing in common": (["p q r s", "t u v w"], [["a b c d"], ["e f g h"]]),
    "two references equally close in length": (["a b c", "q"], [["a b c d", "a b"], ["r"]]),
    "the longer of them first": (["a b c d", "q"], [["a b c d e f", "a b", "a c"], ["r"]]),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str) -> None:
    assert_same(*EDGES[name])


def test_a_word_with_a_space_inside_counts_as_in_the_coco_evaluation() -> None:
    """As the Java tokenizer gives mixed numbers: n-grams see two words, the longest common subsequence one."""
    candidates, references = ["1\xa01/2 cups of tea", "a cat"], [["1 1/2 cups of tea", "1\xa01/2 cups"], ["a dog"]]
    expected = coco(candidates, references)
    for name, function in {"cider_d": cider_d, "bleu": coco_bleu, "rouge_l": coco_rouge_l}.items():
        corpus, _ = function(candidates, references, tokenizer=lambda text: text.split(" "))
        assert corpus.reshape(-1).tolist() == pytest.approx(expected[name][0], abs=TOLERANCE), name


def test_all_scores_together_are_the_scores_one_by_one() -> None:
    candidates, references = samples(50)
    scores = caption_scores(candidates, references, tokenizer=str.split)
    expected = coco(candidates, references)
    assert list(scores) == ["cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    numbers = expected["cider_d"][0] + expected["bleu"][0] + expected["rouge_l"][0]
    assert [float(value) for value in scores.values()] == pytest.approx(numbers, abs=TOLERANCE)


def test_texts_are_split_and_may_be_stripped_to_ascii() -> None:
    people = [["A café!", "the café\u2019s menu"], ["Two dogs."]]
    plain = [["a café", "the café 's menu"], ["two dogs"]]
    ascii_plain = [["a caf", "the caf s menu"], ["two dogs"]]
    given, plain_given = ["A café.", "2 dogs"], (["a café", "2 dogs"], ["a caf", "2 dogs"])
    for ascii_only, texts, words in ((False, plain, plain_given[0]), (True, ascii_plain, plain_given[1])):
        expected = coco(words, texts)["cider_d"][0][0]
        assert float(cider_d(given, people, ascii_only=ascii_only)[0]) == pytest.approx(expected, abs=TOLERANCE)
        metric = CIDErD(ascii_only=ascii_only)
        metric.update(given, people)
        assert float(metric.compute()) == pytest.approx(expected, abs=TOLERANCE)


def test_batches_add_up_and_an_id_counts_once() -> None:
    candidates, references = samples(40)
    expected = coco(candidates, references)
    for with_ids in (False, True):
        metric, cider = CaptionScores(tokenizer=str.split), CIDErD(tokenizer=str.split)
        for each in (metric, cider):
            each.update([], [])
            for start in range(0, 40, 16):
                rows = slice(start, start + 16)
                each.update(candidates[rows], references[rows], range(start, min(start + 16, 40)) if with_ids else None)
        if with_ids:
            metric.update(["something else", *candidates[:1]], [references[39], references[0]], torch.tensor([39, 0]))
            cider.update(candidates[:3], references[:3], [0, 1, 2])
            metric.update([], [], [])
        assert float(cider.compute()) == pytest.approx(expected["cider_d"][0][0], abs=1e-5)
        scores = metric.compute()
        assert [float(scores[f"bleu_{n}"]) for n in (1, 2, 3, 4)] == pytest.approx(expected["bleu"][0], abs=1e-5)
        assert scores["rouge_l"].dtype == torch.float32


def test_samples_without_an_id_all_count_and_a_number_is_no_name() -> None:
    metric = CIDErD()
    for ids in (None, None, [7], ["7"]):
        metric.update(["a cat on a mat"], [["a cat on a mat"]], ids)
    metric.update(["two dogs run"], [["two dogs run"]])
    expected = coco(["a cat on a mat"] * 4 + ["two dogs run"], [["a cat on a mat"]] * 4 + [["two dogs run"]])
    assert float(metric.compute()) == pytest.approx(expected["cider_d"][0][0], abs=1e-5)


def test_metrics_in_a_collection_keep_their_tokenizers() -> None:
    metrics = MetricCollection({"plain": CIDErD(), "ascii": CIDErD(ascii_only=True), "all": CaptionScores()})
    captions, people = ["a café", "two dogs"], [["one café", "a café"], ["2 dogs", "two dogs run"]]
    for row in (0, 1):
        metrics.update([captions[row]], [people[row]])
    scores = metrics.compute()
    assert float(scores["plain"]) == pytest.approx(float(cider_d(captions, people)[0]), abs=1e-5)
    assert float(scores["ascii"]) == pytest.approx(float(cider_d(captions, people, ascii_only=True)[0]), abs=1e-5)
    assert float(scores["cider_d"]) == pytest.approx(float(scores["plain"]))


@nothing_seen
def test_nothing_seen() -> None:
    assert CIDErD().compute().isnan()
    assert all(value.isnan() for value in CaptionScores().compute().values())
    metric = CIDErD()
    metric.update(["a"], [["a"]])
    metric.reset()
    assert metric.compute().isnan()


def test_bad_input_is_refused_and_leaves_nothing_behind() -> None:
    metric = CIDErD()
    metric.update(["a cat"], [["a cat"]], ["x"])
    with pytest.raises(ValueError, match="got 2 predictions for 1 references"):
        metric.update(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"at least one reference in a list, got \[\] for 'a'"):
        metric.update(["a"], [[]])
    with pytest.raises(ValueError, match="at least one reference in a list, got 'a cat' for 'a'"):
        metric.update(["a"], ["a cat"])
    with pytest.raises(ValueError, match="are texts, got "):
        metric.update(["a"], [[None]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="got 1 predictions for 2 ids"):
        metric.update(["a"], [["a"]], [1, 2])
    assert len(metric._captions()[0]) == 1
    with pytest.raises(ValueError, match="unknown tokenizer 'penn'; there are ptb, java"):
        CIDErD(tokenizer="penn")
    metric.update(["a cat"], [["another cat"]], ["x"])
    with pytest.raises(ValueError, match="id 'x' came with different references"):
        metric.compute()
