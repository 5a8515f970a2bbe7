"""Responses to held-out instructions, beside those of the data set.

What instruction tuning is judged by is the perplexity of held-out responses, which the backbone logs as
``val/perplexity``, and a judge's score of free responses: ``dora-lightning mt-bench``. ROUGE-L here is a cheap sign of
whether the model answers in the manner of the data set, no more.
"""

from __future__ import annotations

from typing import Any

from torchmetrics.functional.text import rouge_score

from dora_lightning.data import Sample
from dora_lightning.messages import check_real, check_whole
from tasks.written_answers import WrittenAnswers


class InstructionTuning(WrittenAnswers):
    """Writes a response to each held-out instruction: ROUGE-L (F1) with the data set's, and the share of blank ones.

    Args:
        max_new_tokens: longest response.
        temperature: above 0, responses are sampled.
        num_beams: beams of the search; 1 is greedy.

    Raises:
        ValueError: the temperature is negative, or beams are asked for with a temperature.
    """

    measures = ("rouge_l", "blank")
    title = "Responses"

    def __init__(self, max_new_tokens: int = 256, temperature: float = 0.0, num_beams: int = 1) -> None:
        super().__init__()
        check_whole(1, max_new_tokens=max_new_tokens, num_beams=num_beams)
        check_real(0, temperature=temperature)
        if temperature > 0 and num_beams > 1:
            raise ValueError(f"temperature must be 0 with a beam search, found {temperature} with {num_beams} beams")
        self.generation: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            self.generation["temperature"] = temperature

    def judge(self, text: str, sample: Sample) -> tuple[dict[str, float], dict[str, Any]]:
        """ROUGE-L with the best of the references, and whether there is a response at all."""
        scores = rouge_score([text], [list(sample.references)], rouge_keys="rougeL")
        return {"rouge_l": float(scores["rougeL_fmeasure"]), "blank": float(not text.strip())}, {}
