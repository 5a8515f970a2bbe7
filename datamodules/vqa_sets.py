"""The seven evaluation sets of LLaVA-1.5 in the DoRA paper: their names, and where each is read from."""

from dataclasses import dataclass, replace
from pathlib import Path

from dora_lightning.messages import check_whole

DATASETS = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench")
"""The evaluation sets, in the order of the paper's table."""


@dataclass
class EvaluationSet:
    """Where one evaluation set is: files (``questions`` and so on), or a data set of the hub (``hub_path``).

    Which file is what, for each set:

    ==========  ==========================================================  ===========================================
    set         ``questions``: LLaVA's file, or the official file alone     ``annotations``
    ==========  ==========================================================  ===========================================
    vqav2       JSONL, or ``v2_OpenEnded_mscoco_val2014_questions.json``    ``v2_mscoco_val2014_annotations.json``
    gqa         JSONL, or ``testdev_balanced_questions.json``               the latter, beside LLaVA's
    vizwiz      JSONL, or ``val.json`` / ``test.json``                      ``val.json``, beside LLaVA's
    scienceqa   ``llava_test_CQM-A.json``, or ``pid_splits.json``           ``problems.json``, beside either
    textvqa     JSONL, or ``TextVQA_0.5.1_val.json``                        the latter, beside LLaVA's
    pope        JSONL, or ``coco_pope_*.json`` (one, or a folder of them)   a folder of the latter, beside LLaVA's
    mmbench     ``mmbench_dev_20230712.tsv``                                (none: the table holds everything)
    ==========  ==========================================================  ===========================================

    Without annotations the questions are asked all the same, for a submission file: their samples have no references.
    ScienceQA and POPE have no such test sets and need theirs.

    Args:
        questions: The file that asks.
        annotations: The file (or folder) with the answers, where ``questions`` does not hold them.
        images: The folder that the images' names are relative to.
        ocr: TextVQA's ``TextVQA_Rosetta_OCR_v0.2_val.json``, for ``ocr_tokens`` with the official file.
        ocr_tokens: Name the words that were read in the image in TextVQA's prompts, as LLaVA does. Scores with and
            without them differ by many points and do not compare.
        hub_path: A data set of the Hugging Face hub, ``name`` or ``name:config``, or a folder of the same layout.
        split: The split of the hub's data set or of ScienceQA's ``pid_splits.json``; the one that is scored if None.
        limit: Most questions; in place of the datamodule's ``limit``.
    """

    questions: str | None = None
    annotations: str | None = None
    images: str | None = None
    ocr: str | None = None
    ocr_tokens: bool = True
    hub_path: str | None = None
    split: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the number."""
        check_whole(1, none="the datamodule's", limit=self.limit)


HUB_SETS = {
    "vqav2": ("lmms-lab/VQAv2", "validation"),
    # the configs are named testdev_balanced_instructions and testdev_balanced_images
    "gqa": ("lmms-lab/GQA:testdev_balanced", "testdev"),
    "vizwiz": ("lmms-lab/VizWiz-VQA", "val"),
    "scienceqa": ("lmms-lab/ScienceQA:ScienceQA-FULL", "test"),
    "textvqa": ("lmms-lab/textvqa", "validation"),
    "pope": ("lmms-lab/POPE", "test"),
    "mmbench": ("lmms-lab/MMBench_EN", "dev"),
}
"""Data set on the hub and the split with public answers, of each evaluation set."""

# what LLaVA's docs/Evaluation.md and scripts/v1_5/eval lay out under playground/data/eval
_LLAVA_FILES = {
    "vqav2": ("llava_vqav2_mscoco_test-dev2015.jsonl", None, "test2015"),
    "gqa": ("llava_gqa_testdev_balanced.jsonl", "data/testdev_balanced_questions.json", "data/images"),
    "vizwiz": ("llava_test.jsonl", None, "test"),
    "scienceqa": ("llava_test_CQM-A.json", "problems.json", "images/test"),
    "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json", "train_images"),
    "pope": ("llava_pope_test.jsonl", "coco", "val2014"),
    "mmbench": ("mmbench_dev_20230712.tsv", None, None),
}


def locate(name: str, where: EvaluationSet, data_dir: str | None) -> EvaluationSet:
    """Fill in what is not said: the files of LLaVA's evaluation folder if there is one, else the hub's data set.

    Args:
        name: One of :data:`DATASETS`.
        where: What was said.
        data_dir: LLaVA's ``playground/data/eval``, with a folder for each set.

    Raises:
        ValueError: ``where`` names both files and a data set of the hub, or files but not the questions.
        FileNotFoundError: A file or folder that is named is missing.
    """
    paths = {"questions": where.questions, "annotations": where.annotations, "images": where.images, "ocr": where.ocr}
    named = {field: path for field, path in paths.items() if path is not None}
    if where.hub_path is not None:
        if named:
            raise ValueError(f"{name}: give hub_path or files, not both; found hub_path and {', '.join(named)}")
    elif where.questions is None:
        if set(named) - {"ocr"}:
            raise ValueError(f"{name}: {', '.join(named)} without questions, the file that asks")
        if data_dir is None:
            where = replace(where, hub_path=HUB_SETS[name][0])
        else:
            inside = [None if file is None else str(Path(data_dir, name, file)) for file in _LLAVA_FILES[name]]
            where = replace(where, questions=inside[0], annotations=inside[1], images=inside[2])
    if where.hub_path is not None and where.split is None:
        where = replace(where, split=HUB_SETS[name][1])
    for field in ("questions", "annotations", "images", "ocr"):
        path = getattr(where, field)
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"{name}: {field} {path}: no such file or folder")
    return where
