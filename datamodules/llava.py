"""LLaVA's visual instructions: conversations about images, as in ``llava_v1_5_mix665k.json``."""

from itertools import count
from pathlib import Path
from typing import Any

from datamodules.instructions import check_files
from datamodules.loading import Stage
from datamodules.rows import OnBadRow, Row, convert_file
from datamodules.subsets import permutation
from datamodules.vision import AspectRatio, VisionDataModule
from dora_lightning.data import Sample
from dora_lightning.images import IMAGE
from dora_lightning.llava_parts import LlavaParts
from dora_lightning.messages import check_whole

_SPEAKERS = ("human", "gpt")


class LlavaInstructions(VisionDataModule):
    """Conversations of several turns, each about an image, about several, or about none.

    A row is ``{"id": ..., "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\\n."},
    {"from": "gpt", "value": "."}, ...]}``. ``image`` may be left out, or be a list. Every answer is trained on. As
    in LLaVA, a turn's ``<image>`` is put before its text; in a turn with several they stay where they are, since the
    text may refer to them by their places. Validation and test judge the last answer of held-out conversations.

    Args:
        tokenizer: As in :class:`~datamodules.vision.VisionDataModule`.
        train_file: Conversations to train on, a JSON list or JSONL.
        image_folder: Folder that the images' names are relative to; that of the file if None.
        val_file: Conversations for validation; None to take some of ``train_file``.
        val_size: Conversations of ``train_file``, drawn by ``seed``, that are kept for validation.
        limit_train: Most conversations to train on, drawn by ``seed``.
        template: As in :class:`~datamodules.vision.VisionDataModule`.
        image_aspect_ratio: Likewise.
        batch_size: Likewise.
        eval_batch_size: Likewise.
        cutoff_len: Likewise.
        train_on_inputs: Likewise.
        num_workers: Likewise.
        seed: Likewise.
        on_bad_row: Likewise. Bad is also a row that is no conversation of questions and answers in turn.
        group_by_length: Likewise.
        share_images: Likewise.
        exif_rotation: Likewise.

    Raises:
        ValueError: The arguments contradict each other, or the template is unknown.
        FileNotFoundError: A file or folder is missing.
    """

    def __init__(
        self,
        tokenizer: str | LlavaParts,
        train_file: str,
        image_folder: str | None = None,
        val_file: str | None = None,
        val_size: int = 0,
        limit_train: int | None = None,
        template: str = "vicuna_v1",
        image_aspect_ratio: AspectRatio = "pad",
        batch_size: int = 16,
        eval_batch_size: int = 16,
        cutoff_len: int = 2048,
        train_on_inputs: bool = False,
        num_workers: int = 4,
        seed: int = 42,
        on_bad_row: OnBadRow = "raise",
        group_by_length: bool = True,
        share_images: bool = False,
        exif_rotation: bool = True,
    ) -> None:
        super().__init__(
            tokenizer,
            template,
            image_aspect_ratio,
            batch_size,
            eval_batch_size,
            cutoff_len,
            train_on_inputs,
            num_workers,
            seed,
            on_bad_row,
            group_by_length,
            share_images,
            exif_rotation,
        )
        check_whole(1, none="all", limit_train=limit_train)
        check_whole(0, val_size=val_size)
        if val_file is not None and val_size:
            raise ValueError("give val_file or val_size, not both: one names the validation data, the other draws it")
        check_files(train_file=train_file, val_file=val_file)
        if image_folder is not None and not Path(image_folder).is_dir():
            raise FileNotFoundError(f"image_folder {image_folder}: no such folder")
        self.train_file = train_file
        self.image_folder = image_folder
        self.val_file = val_file
        self.val_size = val_size
        self.limit_train = limit_train
        self._split: tuple[list[Sample], list[Sample]] | None = None

    def build_samples(self, stage: Stage) -> list[Sample]:
        """The conversations of a stage; validation and test have the same.

        Raises:
            ValueError: A row is bad (see ``on_bad_row``), or ``val_size`` leaves nothing to train on.
        """
        if stage != "train" and self.val_file is not None:
            return self._read(self.val_file)
        if self._split is None:
            self._split = self._drawn(self._read(self.train_file))
        return self._split[0 if stage == "train" else 1]

    def _drawn(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        if not 0 <= self.val_size < len(samples):
            raise ValueError(
                f"val_size={self.val_size} must be at least 0 and leave something of {len(samples)} conversations"
            )
        if not self.val_size and self.limit_train is None:
            return samples, []
        order = permutation(len(samples), self.seed)
        validation, train = order[: self.val_size], order[self.val_size :][: self.limit_train]
        return [samples[index] for index in sorted(train)], [samples[index] for index in sorted(validation)]

    def _read(self, file: str) -> list[Sample]:
        numbers = count(1)  # of the rows that are objects, as all are in a sound file
        folder = Path(file).parent if self.image_folder is None else Path(self.image_folder)

        def convert(row: Row) -> Sample:
            return self._sample(row, folder, {"file": file, "row": next(numbers)})

        return convert_file(file, convert, self.on_bad_row)

    def _sample(self, row: Row, folder: Path, place: dict[str, Any]) -> Sample:
        assert self.template is not None
        turns = conversation_turns(row)
        images = tuple(str(folder / name) for name in _image_names(row))
        prompt, target, answered = self.template.sample_text([(image_first(asked), said) for asked, said in turns])
        question, answer = turns[-1]
        return Sample(
            prompt,
            target,
            references=(answer,),
            images=images,
            source="llava",
            row={
                "question_id": row.get("id"),
                "question": question,
                # what the picture of examples shows
                **({"image_path": images[0]} if images else {}),
                **place,
            },
            answered=answered,
        )


def conversation_turns(row: Row) -> list[tuple[str, str]]:
    """Questions and answers of a row of LLaVA's format.

    Raises:
        ValueError: There are none, or they are not asked by ``human`` and answered by ``gpt`` in turn.
    """
    messages = row.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field 'conversations' must be a list of messages, found {messages!r:.80}")
    texts: list[str] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise ValueError(f"message {number} must have the fields 'from' and 'value', found {message!r:.80}")
        speaker, expected = message.get("from"), _SPEAKERS[(number - 1) % 2]
        if speaker not in _SPEAKERS:
            raise ValueError(f"message {number} is from {speaker!r}; expected 'human' or 'gpt'")
        if speaker != expected:
            where = "a conversation begins with 'human'" if number == 1 else "'human' and 'gpt' speak in turn"
            raise ValueError(f"message {number} is from {speaker!r}; expected {expected!r}, since {where}")
        if not message["value"].strip():
            raise ValueError(f"message {number}, from {speaker!r}, is blank")
        texts.append(message["value"])
    if len(texts) % 2:
        raise ValueError(f"message {len(texts)}, the last, is from 'human' and has no answer")
    return list(zip(texts[::2], texts[1::2], strict=True))


def image_first(question: str) -> str:
    """A question with its one ``<image>`` on a line of its own before the text (LLaVA's ``preprocess_multimodal``).

    >>> image_first("What is this? <image>")
    '<image>\\nWhat is this?'
    """
    if question.count(IMAGE) != 1:
        return question
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()


def _image_names(row: Row) -> list[str]:
    names = row.get("image")
    if names is None:
        return []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"field 'image' must be a file name or a list of them, found {row['image']!r:.80}")
    return names
