"""What the evaluation sets ask, free of any file's layout: texts, suffixes, options, and what a submission needs.

The texts are those of LLaVA-1.5's evaluation (its ``docs/Evaluation.md``, ``model_vqa_mmbench.py`` and
``model_vqa_science.py``); where its question files cannot be seen in the code, those of lmms-eval's reproduction.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.conversation import ConversationTemplate, TokenizerTemplate
from datamodules.rows import Row
from dora_lightning.data import Sample
from dora_lightning.images import IMAGE

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
OCR = "\nReference OCR token: "

POPE_CATEGORIES = ("random", "popular", "adversarial")
_LETTERS = "ABCDEFGH"
_ADDED_LINES = tuple(line.strip() for line in (SHORT_ANSWER, LETTER, UNANSWERABLE, OCR))


@dataclass(frozen=True)
class VisualQuestion:
    """One question about an image, or about none."""

    source: str
    """Name that its score is reported under."""
    question_id: Any
    """Number or name of the question in its set."""
    question: str
    """The question alone."""
    text: str
    """All that is put to the model but the image and the conversation template."""
    image: Any = None
    """Image source, or None."""
    answers: tuple[str, ...] = ()
    """Answers that count as right; empty where they are not public."""
    options: tuple[str, ...] = ()
    """What to choose from, as the model would write it; empty if open-ended."""
    target: str | None = None
    """The right answer as the model would write it; the most frequent of ``answers`` if None."""
    fields: Row = field(default_factory=dict)
    """What else scoring and submission need."""

    def sample(self, template: ConversationTemplate | TokenizerTemplate) -> Sample:
        """Render the question in a conversation template."""
        text = self.text if self.image is None else f"{IMAGE}\n{self.text}"
        target = self.target
        if target is None and self.answers:
            target = Counter(self.answers).most_common(1)[0][0]
        prompt, written, _ = template.sample_text([(text, target)])
        path = {"image_path": str(self.image)} if isinstance(self.image, Path) else {}
        asked = {"question_id": self.question_id, "question": self.question, "text": self.text}
        return Sample(
            prompt=prompt,
            target=written,
            options=tuple(template.sample_text([(text, option)])[1] for option in self.options),
            references=self.answers,
            images=() if self.image is None else (self.image,),
            source=self.source,
            row={**asked, **self.fields, **path},
        )


# In the functions below, ``text`` is the one of LLaVA's question file, if the question comes from there.


def vqav2(
    question_id: Any, question: str, image: Any, answers: tuple[str, ...], image_id: Any, text: str | None = None
) -> VisualQuestion:
    """A question of VQAv2."""
    text = text or question + SHORT_ANSWER
    return VisualQuestion("vqav2", question_id, question, text, image, answers, fields={"image_id": image_id})


def gqa(
    question_id: Any, question: str, image: Any, answers: tuple[str, ...], text: str | None = None
) -> VisualQuestion:
    """A question of GQA, which has one answer."""
    return VisualQuestion("gqa", question_id, question, text or question + SHORT_ANSWER, image, answers)


def vizwiz(
    question_id: Any, question: str, image: Any, answers: tuple[str, ...], image_name: str, text: str | None = None
) -> VisualQuestion:
    """A question of VizWiz, which may be unanswerable."""
    text = text or question + UNANSWERABLE + SHORT_ANSWER
    return VisualQuestion("vizwiz", question_id, question, text, image, answers, fields={"image": image_name})


def textvqa(
    question_id: Any,
    question: str,
    image: Any,
    answers: tuple[str, ...],
    image_id: str,
    ocr_tokens: Sequence[str] | None = None,
    text: str | None = None,
) -> VisualQuestion:
    """A question of TextVQA; ``ocr_tokens`` are the words read in the image, None to leave their line out."""
    words = "" if ocr_tokens is None else OCR + ", ".join(ocr_tokens)
    # capitalize() also lowers all other letters; so do LLaVA's and lmms-eval's prompts
    text = text or question.capitalize() + words + SHORT_ANSWER
    return VisualQuestion("textvqa", question_id, question, text, image, answers, fields={"image_id": image_id})


def scienceqa(
    question_id: Any,
    question: str,
    image: Any,
    choices: Any,
    answer: Any,
    hint: str | None = None,
    text: str | None = None,
) -> VisualQuestion:
    """A question of ScienceQA, half of which have no image; ``answer`` is the index of the right choice.

    Raises:
        ValueError: The choices are no list of two texts or more, or the answer is none of them.
    """
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"field 'choices' must be a list of texts, found {choices!r:.80}")
    if not 2 <= len(choices) <= len(_LETTERS):
        raise ValueError(f"field 'choices' must hold 2 to {len(_LETTERS)} texts, found {len(choices)}: {choices!r:.80}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"field 'answer' must be the index of one of {len(choices)} choices, found {answer!r:.80}")
    context = f"Context: {hint}\n" if hint else ""
    letters = tuple(_LETTERS[: len(choices)])
    return VisualQuestion(
        "scienceqa",
        question_id,
        question,
        text or context + question + _listed(letters, choices) + LETTER,
        image,
        (letters[answer],),
        options=letters,
        fields={"choices": choices, "has_image": image is not None},
    )


def pope(
    question_id: Any,
    question: str,
    image: Any,
    label: Any,
    image_name: str,
    category: Any,
    text: str | None = None,
) -> VisualQuestion:
    """A question of POPE, whether an object is in the image.

    Raises:
        ValueError: The label is not yes or no, or the category is none of :data:`POPE_CATEGORIES`.
    """
    if label not in ("yes", "no"):
        raise ValueError(f"the label of POPE must be 'yes' or 'no', found {label!r}")
    if category not in POPE_CATEGORIES:
        raise ValueError(f"the category of POPE must be one of {', '.join(POPE_CATEGORIES)}, found {category!r}")
    return VisualQuestion(
        f"pope_{category}",
        question_id,
        question,
        text or question + SHORT_ANSWER,
        image,
        (label,),
        options=("Yes", "No"),
        target=label.capitalize(),  # as in the instructions that LLaVA is trained on
        fields={"image": image_name, "category": category},
    )


def mmbench(columns: Row, image: Any) -> VisualQuestion:
    """A row of MMBench's table, rotations of the options being rows of their own (``index`` modulo a million is the
    question's).

    Raises:
        ValueError: The index is not a number, a question or its first two options are missing, or the answer is none
            of the options.
    """
    try:
        index = int(columns["index"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"column 'index' must be a number, found {columns.get('index')!r:.80}") from error
    for name in ("question", "hint", "answer", *"ABCD"):
        if not _is_none(columns.get(name)) and not isinstance(columns[name], str):
            raise ValueError(f"column {name!r} must be text, found {columns[name]!r:.80} at index {index}")
    question = columns.get("question")
    if _is_none(question):
        raise ValueError(f"column 'question' is empty at index {index}")
    options: dict[str, str] = {}
    for letter in "ABCD":
        if _is_none(columns.get(letter)):
            break  # as LLaVA, which reads no option beyond the first that is missing
        options[letter] = str(columns[letter])
    if len(options) < 2:
        raise ValueError(f"columns 'A' and 'B' must hold options, found {list(options.values())!r} at index {index}")
    answer = columns.get("answer")
    if not _is_none(answer) and answer not in options:
        raise ValueError(f"column 'answer' must be one of {'/'.join(options)}, found {answer!r} at index {index}")
    hint = "" if _is_none(columns.get("hint")) else f"{columns['hint']}\n"
    return VisualQuestion(
        "mmbench",
        index,
        str(question),
        hint + str(question) + _listed(tuple(options), tuple(options.values())) + LETTER,
        image,
        () if _is_none(answer) else (str(answer),),
        options=tuple(options),
        fields={
            "index": index,
            "category": columns.get("category"),
            "l2_category": columns.get("l2-category", columns.get("L2-category")),
            "options": options,
            # the server wants the column back
            **({"split": columns["split"]} if columns.get("split") else {}),
        },
    )


def bare_question(text: str) -> str:
    """The question in a text of LLaVA's files, without the lines that LLaVA adds.

    >>> bare_question("Is it red?\\nAnswer the question using a single word or phrase.")
    'Is it red?'
    """
    return "\n".join(line for line in text.split("\n") if not line.startswith(_ADDED_LINES))


def without_ocr(text: str) -> str:
    """A text of LLaVA's TextVQA file without the line of words that were read in the image."""
    return "\n".join(line for line in text.split("\n") if not line.startswith(OCR.strip()))


def answer_texts(answers: Any) -> tuple[str, ...]:
    """The texts of human answers, which files hold as texts or as records with a field ``answer``.

    Raises:
        ValueError: They are neither.
    """
    if answers is None:
        return ()
    if isinstance(answers, dict) and isinstance(answers.get("answer"), list):
        answers = answers["answer"]  # a column of records, as older data sets of the hub come out
    if isinstance(answers, list):
        texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in answers]
        if all(isinstance(text, str) for text in texts):
            return tuple(map(str, texts)) if any(texts) else ()  # test splits of the hub hold ten empty texts
    raise ValueError(f"field 'answers' must be a list of texts or of records with 'answer', found {answers!r:.200}")


def _listed(letters: Sequence[str], texts: Sequence[str]) -> str:
    return "".join(f"\n{letter}. {text}" for letter, text in zip(letters, texts, strict=True))


def _is_none(value: Any) -> bool:
    """Whether a cell of MMBench's table is empty; the hub's copies write ``nan``."""
    return value is None or value != value or (isinstance(value, str) and value.lower() in ("", "nan", "none"))
