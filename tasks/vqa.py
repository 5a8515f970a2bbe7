"""Questions about images: short answers and multiple choice, judged as LLaVA-1.5's and VL-BART's benchmarks judge them.

Each :attr:`Sample.source` has its protocol (:mod:`tasks.vqa_protocols`): how the answer is read out of the text and how
it is scored. Submission files (:mod:`tasks.submissions`) and a picture of some answers (:mod:`tasks.picture`) are
written at the end of a test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from torch import Tensor

from dora_lightning.data import Sample
from dora_lightning.gathering import gather
from dora_lightning.messages import check_whole
from dora_lightning.task import Task
from tasks.picture import examples_picture
from tasks.submissions import read_question_ids, require_openpyxl, submission_files
from tasks.vqa_protocols import PROTOCOLS, Protocol, benchmark_of, select_variants
from tasks.vqa_results import Judged, vqa_results
from tasks.vqa_table import results_table

JUDGES = ("generation", "ranking", "both")


class VQA(Task):
    """Scores per benchmark and their unweighted mean, by greedy generation, by ranking the options, or both.

    Results are ``<source>/accuracy`` (generated) and ``<source>/ranking`` (the likeliest option), ``<source>/unparsed``
    (texts without an answer, which count as wrong), and ``<source>/majority``: what always giving the source's most
    frequent answer would score, where there is one short answer. Beside these, ``scienceqa/accuracy`` is that of the
    questions with an image, as published, and ``scienceqa/overall`` that of all; POPE's splits have ``precision``,
    ``recall``, ``f1`` and ``yes_ratio``, and ``pope/f1`` is the mean of the splits; ``mmbench/accuracy`` is circular,
    and ``mmbench/<category>/accuracy`` too; ``easy_vqa/accuracy`` is over all questions of all kinds,
    and ``moving_shapes/accuracy`` over those whose frames were not shuffled.
    ``mean/accuracy`` is the mean of the benchmarks' published numbers, which for POPE is F1.

    Samples without references (hidden test sets) are answered and kept in the records, and not scored.

    Args:
        judge: ``generation``, ``ranking`` or ``both``; samples without options can only be judged by generation, and
            ``both`` ranks those that have options.
        max_new_tokens: longest answer.
        variants: benchmark -> name of a protocol of :data:`tasks.vqa_protocols.PROTOCOLS`, where it is not to be the
            first one: VL-BART's published numbers were made with ``{"vqav2": "vl_t5", "gqa": "label"}``; ``other``
            stands for sources of nobody's benchmark.
        submissions: write the benchmarks' submission files; MMBench's needs openpyxl.
        vqav2_questions: VQAv2's question file, or LLaVA's; the submission then answers all its questions.
        model_id: name of the model in LLaVA's answer files.
        picture: how many examples to draw into ``examples.png``, 0 for none.

    Raises:
        ValueError: unknown judge, benchmark or variant, a negative number of examples, a broken question file.
        FileNotFoundError: no question file.
    """

    def __init__(
        self,
        judge: str = "generation",
        max_new_tokens: int = 16,
        variants: Mapping[str, str] | None = None,
        submissions: bool = True,
        vqav2_questions: str | None = None,
        model_id: str = "",
        picture: int = 12,
    ) -> None:
        super().__init__()
        if judge not in JUDGES:
            raise ValueError(f"judge must be one of {', '.join(JUDGES)}, got {judge!r}")
        check_whole(1, max_new_tokens=max_new_tokens)
        check_whole(0, picture=picture)
        if judge != "ranking":
            self.generation = {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": False}
        self.ranks_options = judge != "generation"
        self.variants = select_variants(variants or {})
        self.submissions = submissions
        self.vqav2_question_ids = read_question_ids(vqav2_questions) if vqav2_questions is not None else None
        self.model_id = model_id
        self.picture = picture
        self._records: list[dict[str, Any]] = []
        self._judged: list[Judged] = []

    def update(
        self, samples: Sequence[Sample], texts: Sequence[str] | None = None, scores: Sequence[Tensor] | None = None
    ) -> None:
        """Read and score each text, and compare the likeliest option with the target.

        Raises:
            ValueError: options are to be ranked and the target is none of them, or nothing can be judged; a row lacks
                what its protocol needs.
            ModuleNotFoundError: MMBench's submission file is to be written and openpyxl is not installed.
        """
        records = [
            {
                **(sample.row or {"prompt": sample.prompt}),
                "source": sample.source,
                "references": list(sample.references),
            }
            for sample in samples
        ]
        if texts is not None:
            if self.submissions and any(sample.source == "mmbench" for sample in samples):
                require_openpyxl()
            self._read(samples, texts, records)
        if scores is not None:
            self._rank(samples, scores, records)
        self._records += records
        pairs = zip(samples, records, strict=True)
        self._judged += [self._to_judged(sample, record) for sample, record in pairs if sample.references]

    def _read(self, samples: Sequence[Sample], texts: Sequence[str], records: list[dict[str, Any]]) -> None:
        for sample, text, record in zip(samples, texts, records, strict=True):
            protocol = self._protocol(sample)
            answer = protocol.read(text, sample)
            record |= {"output_pred": text, "pred": answer, "score": None}
            if sample.references:
                score = float(protocol.score([answer], [sample.references]))
                # nothing is among the answers of people who gave none, and is wrong all the same
                record["score"] = score if answer else 0.0

    def _rank(self, samples: Sequence[Sample], scores: Sequence[Tensor], records: list[dict[str, Any]]) -> None:
        for sample, score, record in zip(samples, scores, records, strict=True):
            if not sample.options:
                if self.generation is None:
                    raise ValueError(f"{sample.source}: a sample has no options to rank; use judge: generation or both")
                continue
            choice = int(score.argmax())
            ranked = sample.options[choice].strip().removesuffix(_terminator(sample))
            record |= {"log_likelihoods": score.tolist(), "ranked": ranked, "ranked_score": None}
            if sample.references:
                if sample.target not in sample.options:
                    raise ValueError(
                        f"{sample.source}: the target {sample.target!r} is not among the options {sample.options}"
                    )
                record["ranked_score"] = float(sample.options[choice] == sample.target)

    def _protocol(self, sample: Sample) -> Protocol:
        benchmark = benchmark_of(sample.source)
        return PROTOCOLS[benchmark][self.variants[benchmark]]

    def _to_judged(self, sample: Sample, record: dict[str, Any]) -> Judged:
        truth_of = self._protocol(sample).truth
        return Judged(
            sample.source,
            score=record.get("score"),
            parsed=record.get("pred") != "",
            ranked=record.get("ranked_score"),
            answer=record["pred"] if benchmark_of(sample.source) == "pope" and "pred" in record else "",
            truth=truth_of(sample.references[0]) if truth_of is not None and len(sample.references) == 1 else "",
            has_image=record.get("has_image", bool(sample.images)),
            number=record.get("index", 0),
            categories=tuple(record[name] for name in ("l2_category", "category") if record.get(name)),
        )

    def compute(self) -> dict[str, Tensor]:
        """Each measure in [0, 1], over the answers of all processes."""
        return vqa_results(gather(self._judged))

    def records(self) -> list[dict[str, Any]]:
        """The rows judged in this process, with ``output_pred``, ``pred`` and ``score`` (None where it is hidden)."""
        return self._records

    def files(self, records: list[dict[str, Any]]) -> dict[str, bytes]:
        """Submission files and ``examples.png``."""
        files: dict[str, bytes] = {}
        if self.submissions:
            files |= submission_files(records, self.vqav2_question_ids, self.model_id)
        picture = examples_picture(records, self.picture)
        return files if picture is None else files | {"examples.png": picture}

    def table(self, metrics: dict[str, Tensor]) -> RenderableType:
        """Sources in rows, measures in columns, in per cent."""
        return results_table(metrics)

    def reset(self) -> None:
        """Forget what was judged."""
        self._records = []
        self._judged = []


def _terminator(sample: Sample) -> str:
    """What the conversation template writes after an answer, and so after each option."""
    target = sample.target.strip()
    answers = [answer for answer in sample.references if answer and target.lower().startswith(answer.lower())]
    return target[len(max(answers, key=len)) :] if answers else ""
