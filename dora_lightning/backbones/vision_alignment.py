"""A first stage for a vision tower that knows nothing yet: its features are made to tell answers from one another.

LLaVA trains its projector on captions before it trains on instructions. A tower that is new needs such a stage all the
more: through a frozen language model it learns slowly, and until it has learned something, the language model learns to
do without it. Here the language model is not run at all, only its word embeddings are read: from an image's projected
features and the words of a question about it, a small head must pick the question's answer among the answers of the
batch. The head is thrown away afterwards. One pass over thousands of small images takes seconds on a CPU.

Shapes: M images in a batch, N tokens of an image, D features of the language model, Q questions, A answers, K width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_lightning.adapters.finite import NonFiniteError
from dora_lightning.data import IGNORE
from dora_lightning.messages import check_real, check_whole

_WARMUP = 0.05


@dataclass
class VisionAlignment:
    """How long and how fast the first stage trains the vision tower and the projector.

    Args:
        epochs: passes over the training images.
        batch_size: images in a batch.
        lr: highest learning rate, after a short warm-up; it ends at 0.
        weight_decay: of the tower, the projector and the head.
        width: of the head.
        seed: seed of the head and of the order of images.

    Raises:
        ValueError: a number is out of range.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    width: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        options = {f"vision_alignment.{name}": value for name, value in vars(self).items()}
        rates = {name: options.pop(name) for name in ("vision_alignment.lr", "vision_alignment.weight_decay")}
        check_real(above=0, **{"vision_alignment.lr": rates["vision_alignment.lr"]})
        check_real(0, **rates)
        check_whole(0, **{"vision_alignment.seed": options.pop("vision_alignment.seed")})
        check_whole(1, **options)


@dataclass
class QuestionedImages:
    """Images with the questions about them, as training batches hold them.

    Attributes:
        pixels: of each image ``[3, height, width]``.
        asked: of each image, the numbers of its questions and of their answers.
        questions: tokens of a question -> its number.
        answers: tokens of an answer -> its number.
    """

    pixels: list[Tensor] = field(default_factory=list)
    asked: list[list[tuple[int, int]]] = field(default_factory=list)
    questions: dict[tuple[int, ...], int] = field(default_factory=dict)
    answers: dict[tuple[int, ...], int] = field(default_factory=dict)

    def add(self, batch: dict[str, Any], image_token: int) -> None:
        """Add the conversations of a batch that are about one image.

        Raises:
            ValueError: the model takes more of an image than its pixels.
        """
        vision = batch.get("vision", {})
        if more := sorted(vision.keys() - {"pixel_values"}):
            raise ValueError(f"vision_alignment is for models that read pixel_values alone; this reads {more[0]} too")
        pixels = iter(vision.get("pixel_values", ()))
        # what the rows of several questions share is no part of a question
        shared = batch["turns"] == 0 if "turns" in batch else torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        left_out = shared | (batch["input_ids"] == image_token)
        rows = zip(batch["samples"], batch["input_ids"], batch["labels"], left_out, strict=True)
        for sample, ids, labels, out in rows:
            own = [next(pixels) for _ in sample.images]
            pairs = list(_questions_and_answers(ids[~out].tolist(), labels[~out].tolist()))
            if len(own) == 1 and pairs:
                self.pixels.append(own[0])
                self.asked.append(
                    [
                        (
                            self.questions.setdefault(q, len(self.questions)),
                            self.answers.setdefault(a, len(self.answers)),
                        )
                        for q, a in pairs
                    ]
                )


def align_vision(model: PreTrainedModel, projector: nn.Module, images: QuestionedImages, how: VisionAlignment) -> float:
    """Train what trains outside of the language model, in place.

    At the end the projector is scaled so that an image's tokens are as long as the embeddings of words: features that
    have grown meanwhile would drown what the language model knows.

    Args:
        model: LLaVA-style model; of its parameters outside of the language model, those that train are trained.
        projector: its projector.
        images: what to train on.
        how: how long and how fast.

    Returns:
        Share of the answers of the last epoch that were picked rightly, in [0, 1].

    Raises:
        ValueError: no conversation is about a single image, or there is one answer alone.
        NonFiniteError: a loss is NaN or infinite.
    """
    if len(images.answers) < 2:
        raise ValueError(
            f"vision_alignment: the training data has {len(images.pixels)} conversations about one image and "
            f"{len(images.answers)} different answers in them; it takes at least two"
        )
    words: Tensor = cast(Any, model).get_input_embeddings().weight.detach()
    device = words.device
    questions, answers = _centred(words, images.questions), _centred(words, images.answers)
    inside = {id(parameter) for parameter in model.get_decoder().parameters()}
    trained = [p for p in model.model.parameters() if p.requires_grad and id(p) not in inside]
    generator = torch.Generator().manual_seed(how.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        head = _AnswerHead(words.shape[1], how.width).to(device)
    parameters = [*trained, *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, how.lr, betas=(0.9, 0.98), weight_decay=how.weight_decay)
    steps = how.epochs * -(-len(images.pixels) // how.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.lr, total_steps=steps + 1, pct_start=_WARMUP, cycle_momentum=False
    )
    share = 0.0
    for epoch in range(how.epochs):
        right = asked = 0
        losses = torch.zeros((), device=device)
        for chosen in torch.randperm(len(images.pixels), generator=generator).split(how.batch_size):
            pixels = torch.stack([images.pixels[index] for index in chosen.tolist()]).to(device)
            features = _pooled(model, pixels)  # [M, D]
            owner, question, answer = _pairs(images, chosen.tolist(), device)
            candidates, target = answer.unique(return_inverse=True)
            scores = head(features[owner], questions[question], answers[candidates])  # [pairs, candidates]
            loss = F.cross_entropy(scores, target)
            loss.backward()
            losses += loss.detach()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            right += int((scores.argmax(dim=1) == target).sum())
            asked += len(target)
        if not math.isfinite(float(losses)):
            raise NonFiniteError(
                f"vision_alignment: a loss of epoch {epoch + 1} is NaN or infinite, at a learning rate of up to "
                f"{how.lr:g}; try a lower one (vision_alignment.lr), or dtype: float32"
            )
        share = right / asked
        rank_zero_info(
            f"Aligning images with words, epoch {epoch + 1} of {how.epochs}: "
            f"{100 * share:.1f} % of {asked} answers picked rightly"
        )
    _scale(model, projector, images, words)
    return share


class _AnswerHead(nn.Module):
    """Scores answers by an image's features and a question's words."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.image = nn.Linear(features, width)
        self.question = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.both = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.answer = nn.Linear(features, width)
        self.temperature = nn.Parameter(torch.tensor(2.5))

    def forward(self, image: Tensor, question: Tensor, answers: Tensor) -> Tensor:
        """Scores ``[P, A]`` of ``answers [A, D]`` for ``image [P, D]`` and ``question [P, D]``."""
        product = self.image(image) * self.question(question)
        picked = F.normalize(product + self.both(product), dim=-1)
        return picked @ F.normalize(self.answer(answers), dim=-1).T * self.temperature.exp()


def _number(numbers: dict[tuple[int, ...], int], text: tuple[int, ...]) -> int:
    return numbers.setdefault(text, len(numbers))


def _questions_and_answers(ids: list[int], labels: list[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Runs of tokens that are not trained on, each with the run after it that is."""
    question: list[int] = []
    answer: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE:
            answer.append(token)
            continue
        if answer:
            yield tuple(question), tuple(answer)
            question, answer = [], []
        question.append(token)
    if answer:
        yield tuple(question), tuple(answer)


def _centred(words: Tensor, texts: Iterable[tuple[int, ...]]) -> Tensor:
    """Mean word embedding of each text ``[texts, D]``, without what all have in common, as those of a template."""
    means = torch.stack([words[list(tokens)].float().mean(dim=0) for tokens in texts])
    return F.normalize(means - means.mean(dim=0), dim=-1) * means.shape[1] ** 0.5


def _pooled(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    return torch.stack([tokens.float().mean(dim=0) for tokens in _projected(model, pixels)])


def _projected(model: PreTrainedModel, pixels: Tensor) -> list[Tensor]:
    """Projected features ``[N, D]`` of each image."""
    features: Any = model.model.get_image_features(pixel_values=pixels)
    return list(getattr(features, "pooler_output", features))  # before transformers 5.1 they came alone


def _pairs(images: QuestionedImages, chosen: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which image of the batch, which question and which answer, ``[pairs]`` each."""
    rows = [(place, q, a) for place, index in enumerate(chosen) for q, a in images.asked[index]]
    owner, question, answer = torch.tensor(rows, device=device).unbind(dim=1)
    return owner, question, answer


@torch.no_grad()
def _scale(model: PreTrainedModel, projector: nn.Module, images: QuestionedImages, words: Tensor) -> None:
    sample = torch.stack(images.pixels[:64]).to(words.device)
    ours = torch.cat(_projected(model, sample)).float().norm(dim=-1).mean()
    scale = words.float().norm(dim=-1).median() / ours
    last = [layer for layer in projector.modules() if isinstance(layer, nn.Linear)][-1]
    for parameter in last.parameters():
        parameter.mul_(scale)
