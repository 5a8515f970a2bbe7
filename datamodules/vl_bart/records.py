"""The records between a benchmark's files and what VL-BART reads: one for anything asked, one for a clip of a video."""

from typing import Any, NamedTuple


class Asked(NamedTuple):
    """Something to read and look at, and what is to be written: one row of any of VL-BART's tasks.

    The encoder reads ``before + subtitles + after``; where that is too long, subtitles are cut first.
    """

    source: str
    """Name of the data set, e.g. ``vqav2``."""

    visuals: tuple[str, ...]
    """Ids of the images, or the id of the one video: names of files without folder and ending."""

    before: str
    """Text before the subtitles, the task's prompt included; all of the text where there are none."""

    subtitles: str = ""
    """What is said in the video."""

    after: str = ""
    """Text after the subtitles."""

    answers: tuple[tuple[str, float], ...] = ()
    """Targets with their scores; one is drawn in proportion each time the row is trained on. Empty where hidden."""

    weighted: bool = False
    """Whether the drawn target's score weighs the row's loss, as in VL-T5's VQAv2."""

    mean_by_sample: bool = False
    """Whether the loss is the mean over rows of each row's mean over tokens, rather than the mean over tokens."""

    references: tuple[str, ...] = ()
    """Answers that count as right; empty where they are hidden."""

    options: tuple[str, ...] = ()
    """Texts to rank, where the task is judged so."""

    shuffle: int | None = None
    """Number by which the frames of its video are put in another order, to see what the order is worth; an odd one
    gives the order of the even one before it backwards, so that whoever goes by the order is misled by one of the two.
    None leaves them as they are."""

    max_target_tokens: int = 10
    """Most tokens of a target, special tokens included."""

    max_input_tokens: int = 20
    """Most tokens that the encoder reads of the text, special tokens included."""

    row: dict[str, Any] = {}  # noqa: RUF012  # never changed: a named tuple's default
    """What a submission file and the scores need, as plain values."""


class Subtitle(NamedTuple):
    """What is said from ``start`` to ``end``, in seconds."""

    text: str
    start: float
    end: float


class VideoRow(NamedTuple):
    """A row of a video benchmark as its files have it, for whatever model reads it."""

    source: str
    """``tvqa``, ``how2qa``, ``tvc`` or ``yc2c``."""

    video: str
    """The video's id, the name of its file."""

    span: tuple[float, float] | None = None
    """Seconds that the row is about; None where its files give none."""

    question: str = ""
    """Empty where a caption is asked for."""

    choices: tuple[str, ...] = ()
    """Answers to choose from, as they are written in the file."""

    answer: int | None = None
    """Index of the right choice; None where it is hidden."""

    captions: tuple[str, ...] = ()
    """People's captions; empty where they are hidden."""

    subtitles: tuple[Subtitle, ...] = ()
    """All of the video's, in their order."""

    row: dict[str, Any] = {}  # noqa: RUF012  # as above
    """``qid`` or ``clip_id``, ``vid_name``, ``ts`` as the file has it, and ``duration``."""
