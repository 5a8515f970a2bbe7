"""Every shipped config of VL-BART has the published numbers, and trains and tests on small data in the true files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vl_bart_example
import yaml
from tiny import RunCLI
from tiny_vl_bart import save_bart
from vl_bart_example import IMAGE_SETS, write_grid, write_moments, write_value

from dora_lightning.adapters import adapter_layers
from dora_lightning.callbacks import GroupLearningRates
from dora_lightning.cli import DoRACLI
from dora_lightning.data import Sample
from dora_lightning.training import WarmupDecay

ROOT = Path(__file__).parent.parent / "configs" / "vlbart"
EASY = ROOT / "easy-vqa.yaml"
RUNS = sorted(path for path in ROOT.glob("*.yaml") if path != EASY)
IMAGES, VIDEOS = ("vqav2", "gqa", "nlvr2", "coco_captions"), ("tvqa", "how2qa", "tvc", "yc2c")

# rate and batch sizes: the scripts of DoRA's and VL-Adapter's repositories, where 300 (500) stands for VQAv2's, and the
# others' are 100/60, 20/60 and 50/60 of it
PUBLISHED = {
    "image-dora": (1e-3, (300, 500, 100, 250)),
    "image-lora": (1e-3, (500, 833, 166, 416)),
    "image-full": (1e-4, (500, 833, 166, 416)),
    "video-dora": (2.4e-4, (40, 40, 40, 40)),
    "video-lora": (3e-4, (50, 50, 50, 50)),
    "video-full": (3e-5, (50, 50, 50, 50)),
}
# where VL-Adapter's folder has the features of a set, and VALUE's those of a set's videos
FEATURES = {"vqav2": "COCO", "gqa": "GQA", "nlvr2": "nlvr", "coco_captions": "COCO"}
VIDEO_FEATURES = {"tvqa": "tv", "how2qa": "how2", "tvc": "tv", "yc2c": "yc2"}

pytestmark = pytest.mark.filterwarnings("ignore")
ReadConfig = Callable[..., DoRACLI]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the configs name: BART, and the data sets with features of the published widths."""
    folder = tmp_path_factory.mktemp("published")
    save_bart(folder / "facebook" / "bart-base")
    data = folder / "data" / "vlbart"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_bart_example, "C", 2048)
        for name, (place, write) in IMAGE_SETS.items():
            for image in write(data / place):
                write_grid(data / FEATURES[name] / "clip_features" / "data_clip_RN101_att", image)
        patch.setattr(vl_bart_example, "C", 512)
        for name, videos in write_value(data / "video" / "ann").items():
            for video in videos:
                write_moments(data / "video" / "vis_features" / VIDEO_FEATURES[name] / "clip-vit", video)
    return folder


@pytest.fixture
def read_config(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReadConfig:
    """Instantiates a config in an empty folder that has what it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(published / "cache"))
    for name in ("data", "facebook"):
        (tmp_path / name).symlink_to(published / name)

    def read(path: Path, *options: str) -> DoRACLI:
        monkeypatch.setattr("sys.argv", ["dora-lightning"])
        return DoRACLI(["--config", str(path), *QUIET, *options], run=False)

    return read


QUIET = ("--trainer.accelerator", "cpu", "--data.init_args.num_workers", "0", "--trainer.enable_progress_bar", "false")


def sources_of(path: Path) -> tuple[str, ...]:
    return IMAGES if path.stem.startswith("image") else VIDEOS


def test_all_runs_are_there() -> None:
    assert PUBLISHED.keys() == {path.stem for path in RUNS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_published_numbers(read_config: ReadConfig, path: Path) -> None:
    cli = read_config(path)
    model, data, adapter = cli.model, cli.datamodule, cli.model.adapter
    kind, _, method = path.stem.partition("-")
    rate, sizes = PUBLISHED[path.stem]
    optimizer = model.optimizer([torch.nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["eps"], group["betas"], group["weight_decay"]) == (rate, 1e-6, (0.9, 0.999), 0.01)
    schedule = model.lr_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    assert isinstance(schedule, WarmupDecay)
    assert (schedule.warmup, schedule.decay) == (0.1, "linear")
    assert (cli.trainer.max_epochs, cli.trainer.gradient_clip_val) == (20 if kind == "image" else 7, 5.0)
    assert cli.trainer.accumulate_grad_batches == cli.trainer.num_devices == 1
    assert (cli.config["seed_everything"], data.seed, cli.trainer.precision) == (9595, 9595, "32-true")
    assert cli.config["trainer"]["default_root_dir"] == f"runs/vlbart/{path.stem}"
    assert (model.parts.language, model.parts.feature_dim) == ("facebook/bart-base", 2048 if kind == "image" else 512)
    assert data.model_name == model.parts
    assert adapter.method == method
    if method == "dora":
        assert (adapter.rank, adapter.scaling, adapter.dropout, adapter.detach_norm) == (128, 1.0, 0.0, True)
    elif method == "lora":
        assert (adapter.rank, adapter.scaling, adapter.dropout) == (128, 0.25, 0.1)
    assert tuple(data.options) == sources_of(path)
    assert tuple(data.batch_sizes().get(source, data.batch_size) for source in data.options) == sizes
    assert data.truncation == "subtitles"
    rows = {name: options.rows for name, options in data.options.items()}
    assert {each.prompts for each in rows.values()} == {"none" if path.stem == "image-full" else "published"}
    if kind == "image":
        assert (rows["gqa"].train, rows["gqa"].validate) == (["train.json", "valid.json"], ["testdev.json"])
        assert {options.visuals.grid_rows for options in data.options.values()} == {36}
    else:
        assert {options.visuals.video_rows for options in data.options.values()} == {64}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_published_decoding(read_config: ReadConfig, path: Path) -> None:
    task = read_config(path).model.task
    for source in sources_of(path):
        judge = task.judge_of([Sample("", "", source=source)])
        assert judge.ranks_options == (source == "nlvr2")
        if source == "nlvr2":
            assert judge.generation is None
            continue
        captions = source in ("coco_captions", "tvc", "yc2c")
        assert judge.generation["num_beams"] == (5 if captions else 1)
        assert not judge.generation["do_sample"]
        # the published lengths, 40 and 20, count the token that the decoder starts with
        assert judge.generation["max_new_tokens"] == (39 if source == "coco_captions" else 19)
    if "vqav2" in sources_of(path):
        variants = task.judge_of([Sample("", "", source="gqa")]).variants
        assert (variants["vqav2"], variants["gqa"]) == ("vl_t5", "label")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_trains_and_tests(read_config: ReadConfig, path: Path, tmp_path: Path) -> None:
    cli = read_config(path, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1")
    kind, _, method = path.stem.partition("-")
    cli.trainer.fit(cli.model, cli.datamodule)
    # a batch of each task
    assert cli.trainer.global_step == 4
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])
    check_what_trains(cli.model, kind, method)
    check_groups(cli, path)
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    metrics = cli.trainer.callback_metrics
    written = {file.name for file in tmp_path.rglob("lightning_logs/version_0/*")}
    if kind == "image":
        expected = {"vqav2/accuracy", "gqa/accuracy", "nlvr2/accuracy", "coco_captions/cider_d", "mean/headline"}
        assert {f"test/{name}" for name in expected} <= metrics.keys()
        assert "nlvr2_predictions.csv" in written
    else:
        # the answers are hidden
        assert not any(name.startswith("test/") for name in metrics)
        assert {f"{name}_submission.json" for name in ("tvqa", "how2qa")} <= written
        assert {f"{name}_submission.jsonl" for name in ("tvc", "yc2c")} <= written


def check_what_trains(model: Any, kind: str, method: str) -> None:
    bart = model.language_model
    named = {name.replace("base_layer.", ""): p.requires_grad for name, p in bart.named_parameters()}
    if method == "full":
        assert all(named.values())
        return
    adapted = [name for name, _ in adapter_layers(bart)]
    # all attentions of two layers each, the decoder's own and that on the encoder
    assert len(adapted) == 2 * (2 + 2 * 2)
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}
    for name, trains in named.items():
        expected = (
            name.startswith("visual_embedding.")
            or name.endswith((".bias", ".lora_A", ".lora_B", ".magnitude"))
            or ("norm" in name and (kind, method) == ("image", "dora"))
        )
        assert trains == expected, name


def check_groups(cli: DoRACLI, path: Path) -> None:
    rate, _ = PUBLISHED[path.stem]
    names = {id(parameter): name for name, parameter in cli.model.named_parameters()}
    decay: dict[str, float] = {}
    for group in cli.trainer.optimizers[0].param_groups:
        assert (group["initial_lr"], group["eps"]) == (rate, 1e-6)
        decay |= {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    assert decay.keys() == {name for name, parameter in cli.model.named_parameters() if parameter.requires_grad}
    for name, value in decay.items():
        without = name.endswith("bias") or bool(re.search(r"norm(_embedding)?\.weight", name))
        assert value == (0.0 if without else 0.01), name
    # of each sort of them there are some
    ends = {"visual_embedding.feature.weight": 0.01, "visual_embedding.feature_norm.weight": 0.0}
    if path.stem.endswith("dora"):
        ends |= {"magnitude": 0.01, "lora_A": 0.01, "lora_B": 0.01, "q_proj.base_layer.bias": 0.0}
    if path.stem in ("image-dora", "image-full"):
        ends |= {"self_attn_layer_norm.weight": 0.0, "encoder.layernorm_embedding.weight": 0.0}
    for end, value in ends.items():
        assert {found for name, found in decay.items() if name.endswith(end)} == {value}, end


def test_runs_of_a_kind_differ_in_nothing_else() -> None:
    for kind in ("image", "video"):
        first, *others = [shared_part(ROOT / f"{kind}-{method}.yaml") for method in ("dora", "lora", "full")]
        assert all(other == first for other in others)


def shared_part(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    del model["adapter"], model["also_trained"], model["optimizer"]["init_args"]["lr"]
    del trainer["default_root_dir"], data["eval_batch_size"]
    for options in (data, *data["tasks"].values()):
        options.pop("batch_size", None)
        options.pop("prompts", None)
    trainer["callbacks"][-1]["init_args"].pop("magnitude", None)
    return config


def test_the_commands_of_a_video_run(
    read_config: ReadConfig, run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "video-dora.yaml"
    run_cli("fit", "--config", path, *QUIET, "--trainer.max_steps", 2)
    run = tmp_path / "runs" / "vlbart" / "video-dora" / "version_0"
    assert len(json.loads((run / "tvqa_submission.json").read_text())) == 3
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    capsys.readouterr()
    judged = ("--model.init_args.judge_in_validation", "true")
    run_cli("validate", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt", *judged)
    printed = capsys.readouterr().out
    for name in ("tvqa/accuracy", "how2qa/accuracy", "tvc/cider_d", "yc2c/cider_d", "mean/headline"):
        assert f"val/{name}" in printed


def test_easy_vqa(read_config: ReadConfig, run_cli: RunCLI, tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    cli = read_config(EASY)
    assert cli.datamodule.model_name == cli.model.parts
    assert cli.model.adapter.method == "dora"
    assert not any(isinstance(callback, GroupLearningRates) for callback in cli.trainer.callbacks)
    small = {"train_images": 8, "test_size": 40, "batch_size": 4}
    options = [part for name, value in small.items() for part in (f"--data.init_args.{name}", value)]
    run_cli("fit", "--config", EASY, *QUIET, *options, "--trainer.max_steps", 2)
    run = tmp_path / "runs" / "vlbart" / "easy-vqa" / "version_0"
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 2
    assert {"test/easy_vqa/accuracy", "test/easy_vqa/majority"} <= result["after"].keys()
    assert (run / "merged" / "config.json").is_file()
    # its tokenizer knows each word of a question as one token
    cli.datamodule.setup("test")
    for question in ("vqa: what color is the rectangle?", "vqa: does the image not contain a teal circle?"):
        assert len(cli.datamodule.tokenizer(question)["input_ids"]) == len(re.findall(r"\w+|[:?]", question)) + 2
