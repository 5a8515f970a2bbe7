import builtins
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.conversation import get_conversation_template
from datamodules.easy_vqa import EasyVQADataModule
from datamodules.easy_vqa_questions import ALL_ANSWERS
from dora_lightning.data import IGNORE, Sample
from tests.datamodules.conversation_examples import make_bpe, save_llava_processor

easy_vqa = pytest.importorskip("easy_vqa")

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
)


def module(**options: Any) -> EasyVQADataModule:
    """A datamodule whose samples are asked for without a model."""
    data = EasyVQADataModule("no-model", **options)
    data.template = get_conversation_template("vicuna_v1")
    return data


def turns(sample: Sample) -> list[tuple[str, str]]:
    """Questions and answers of a conversation, read out of its text."""
    text = (sample.prompt + sample.target).removeprefix(SYSTEM)
    rounds = [part.split(" ASSISTANT: ") for part in text.removesuffix("</s>").split("</s>USER: ")]
    return [(question, answer) for question, answer in rounds]


def image_id(sample: Sample) -> int:
    return int(Path(sample.images[0]).stem)


def published(split: str) -> list[tuple[str, str, int]]:
    texts, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    return list(zip(texts, answers, images, strict=True))


def test_answers_are_those_of_the_package() -> None:
    assert sorted(ALL_ANSWERS) == sorted(easy_vqa.get_answers())


def test_one_conversation_holds_all_questions_about_an_image() -> None:
    samples = module(val_images=0).build_samples("train")
    assert len(samples) == 4000
    found = [(question, answer, image_id(sample)) for sample in samples for question, answer in turns(sample)]
    assert sorted(found) == sorted(published("train"))
    sample = samples[0]
    assert sample.prompt.startswith(SYSTEM)
    assert Path(sample.images[0]).is_file()
    # every answer is trained: the last one is the target, the others are spans of the prompt
    answers = [sample.prompt[start:end] for start, end in sample.answered] + [sample.target]
    assert answers == [f" {answer}</s>" for _, answer in turns(sample)]


def test_conversations_are_shuffled_by_the_seed() -> None:
    order = [question for question, _ in turns(module().build_samples("train")[0])]
    assert order == [question for question, _ in turns(module().build_samples("train")[0])]
    number = image_id(module(val_images=0).build_samples("train")[0])
    in_file = [text for text, _, image in published("train") if image == number]
    orders = [
        [question for question, _ in turns(module(val_images=0, seed=seed).build_samples("train")[0])]
        for seed in range(3)
    ]
    assert all(sorted(order) == sorted(in_file) for order in orders)
    assert len({tuple(order) for order in [*orders, in_file]}) == 4


def test_long_conversations_are_cut_into_several() -> None:
    samples = module(val_images=0, questions_per_conversation=4).build_samples("train")
    lengths = [len(turns(sample)) for sample in samples]
    assert max(lengths) == 4
    assert len(samples) == sum(-(-n // 4) for n in Counter(image for *_, image in published("train")).values())
    assert sum(lengths) == 38575
    drawn = module(val_images=0, questions_per_image=6, questions_per_conversation=4).build_samples("train")
    per_image: Counter[int] = Counter()
    for sample in drawn:
        per_image[image_id(sample)] += len(turns(sample))
    assert max(per_image.values()) == 6
    assert len(per_image) == 4000


def test_validation_images_are_never_trained_on() -> None:
    data = module(val_images=300, val_size=200, train_images=1000)
    trained = {image_id(sample) for sample in data.build_samples("train")}
    validation = data.build_samples("validate")
    assert (len(trained), len(validation)) == (1000, 200)
    assert not trained & {image_id(sample) for sample in validation}
    assert all("/train/" in str(sample.images[0]) for sample in validation)
    # more training images leave the validation as it is
    assert module(val_images=300, val_size=200).build_samples("validate") == validation
    assert module(val_images=300, val_size=200, seed=1).build_samples("validate") != validation
    whole = module(val_images=300, val_size=None)
    held_out = set(range(4000)) - {image_id(sample) for sample in whole.build_samples("train")}
    assert len(whole.build_samples("validate")) == sum(image in held_out for *_, image in published("train"))
    assert module(val_images=0).build_samples("validate") == []
    with pytest.raises(ValueError, match="val_images=4000 must leave something of 4000 training images"):
        module(val_images=4000).build_samples("train")


def test_test_questions_are_asked_alone() -> None:
    samples = module().build_samples("test")
    found = [(sample.row["question"], *sample.references, sample.row["image_id"]) for sample in samples if sample.row]
    assert found == published("test")
    sample = samples[0]
    assert sample.prompt == SYSTEM + "what is the red shape? ASSISTANT:"
    assert (sample.target, sample.references, sample.answered) == (" triangle</s>", ("triangle",), ())
    assert sample.row == {
        "question_id": 0,
        "question": "what is the red shape?",
        "text": "what is the red shape?",
        "image_id": 0,
        "image_path": easy_vqa.get_test_image_paths()[0],
    }
    assert all(sample.target in sample.options and len(sample.options) == 13 for sample in samples)
    # counted in the package's file
    kinds = {"easy_vqa_shape": 1257, "easy_vqa_color": 1280, "easy_vqa_yes_no": 7136}
    assert Counter(sample.source for sample in samples) == kinds


def test_options_of_the_kind() -> None:
    samples = module(options="kind").build_samples("test")[:3]
    assert samples[0].options == (" circle</s>", " rectangle</s>", " triangle</s>")
    assert len(samples[1].options) == 8  # what is the color of the triangle?
    assert all(sample.target in sample.options for sample in samples)


def test_a_part_of_the_test_keeps_the_proportions_of_the_answers() -> None:
    whole = Counter(answer for _, answer, _ in published("test"))
    samples = module(test_size=500).build_samples("test")
    assert len(samples) == 500
    for answer, count in Counter(sample.references[0] for sample in samples).items():
        assert abs(count - 500 * whole[answer] / 9673) < 1
    numbers = [sample.row["question_id"] for sample in samples if sample.row]
    assert numbers == sorted(set(numbers))
    assert module(test_size=500, seed=1).build_samples("test") != samples
    assert len(module(test_size=20_000).build_samples("test")) == 9673


def test_the_suffix_is_in_training_and_test() -> None:
    data = module(short_answer_suffix=True)
    suffix = "\nAnswer the question using a single word or phrase."
    assert all(question.endswith(suffix) for question, _ in turns(data.build_samples("train")[0]))
    assert data.build_samples("test")[0].prompt.endswith(f"shape?{suffix} ASSISTANT:")


def test_batches(tmp_path: Path) -> None:
    tokenizer = make_bpe()
    data = EasyVQADataModule(
        save_llava_processor(tmp_path, tokenizer), train_images=8, val_size=6, test_size=5, batch_size=4
    )
    data.setup("fit")
    data.setup("test")
    (first, _) = data.train_dataloader()
    assert first["vision"]["pixel_values"].shape == (4, 3, 32, 32)
    for labels, sample in zip(first["labels"], first["samples"], strict=True):
        trained = tokenizer.decode(labels[labels != IGNORE])
        assert trained.split() == " ".join(f"{answer}</s>" for _, answer in turns(sample)).split()
    assert sum(len(batch["samples"]) for batch in data.val_dataloader()) == 6
    assert sum(len(batch["samples"]) for batch in data.test_dataloader()) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_images": 0}, "train_images must be at least 1, or null for all, found 0"),
        ({"questions_per_conversation": -1}, "questions_per_conversation must be at least 1"),
        ({"val_images": -1}, "val_images must be at least 0, found -1"),
        ({"val_size": -1}, "val_size must be at least 0, or null for all, found -1"),
        ({"options": "some"}, "options must be 'all' or 'kind', found 'some'"),
    ],
)
def test_arguments_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "easy_vqa":
            raise ModuleNotFoundError("No module named 'easy_vqa'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dora-lightning\[quickstart\]'"):
        module().build_samples("test")
