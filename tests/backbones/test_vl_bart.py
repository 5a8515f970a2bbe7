"""DoRAVLBart: what trains, losses and rankings against sums worked out here, merging, the paper's share."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_vl_bart import TOWER, features, save_bart
from torch import Tensor, nn
from transformers import BartConfig

from dora_lightning import AdapterConfig, merge_adapters
from dora_lightning.adapters import adapter_layers, summarize_adapters
from dora_lightning.backbones import DoRAVLBart
from dora_lightning.data import Sample
from dora_lightning.open_clip_tower import OpenClipVision
from dora_lightning.vl_bart import VLBart, VLBartConfig, VLBartParts, load_vl_bart

C = 24


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path_factory.getbasetemp() / "vl-bart-cache"))


def make(bart: Path, method: str = "dora", **options: Any) -> DoRAVLBart:
    adapter = AdapterConfig(method, 4, 4.0, target_modules=["q_proj", "v_proj"])
    parts = options.pop("parts", None) or VLBartParts(str(bart), feature_dim=C)
    backbone = DoRAVLBart(parts, adapter, optimizer=partial(torch.optim.AdamW, lr=0.01), **options)
    backbone.configure_model()
    return backbone


def perturb(backbone: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def batch_of(backbone: DoRAVLBart, weights: list[float] | None = None) -> dict[str, Any]:
    texts, answers = ["vqa: what color is it?", "is it red", "nlvr: circle"], ["red", "blue circle", "yes"]
    tokenizer = backbone.tokenizer
    inputs, targets = (tokenizer(rows, padding=True, return_tensors="pt") for rows in (texts, answers))
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
    samples = [
        Sample(t, a, options=("red", "blue", "blue circle"), source="x") for t, a in zip(texts, answers, strict=True)
    ]
    batch = dict(inputs) | {"labels": labels, "samples": samples, "vision": features(3, 1, 4, C)}
    return batch if weights is None else batch | {"row_weights": torch.tensor(weights)}


@pytest.mark.parametrize("weights", [None, [1.0, 0.3, 0.6]])
def test_loss(bart: Path, weights: list[float] | None) -> None:
    backbone = make(bart).eval()
    perturb(backbone)
    batch = batch_of(backbone, weights)
    labels = batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | batch["vision"]
    logits = backbone.language_model(**inputs, labels=labels.clamp(min=0)).logits
    # as transformers shifts: the decoder reads </s> and the labels, padding where they are -100
    start = torch.full((3, 1), backbone.tokenizer.eos_token_id)
    read = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, backbone.tokenizer.pad_token_id)], 1)
    logits = backbone.language_model(**inputs, decoder_input_ids=read).logits
    losses = [F.cross_entropy(logits[b][labels[b] >= 0], labels[b][labels[b] >= 0], reduction="none") for b in range(3)]
    loss, count = backbone.loss(batch)
    assert count == (sum(len(each) for each in losses) if weights is None else 3)
    if weights is None:
        expected = torch.cat(losses).mean()
    else:
        expected = sum(w * each.mean() for w, each in zip(weights, losses, strict=True)) / 3
    torch.testing.assert_close(loss, expected)


def test_rankings(bart: Path) -> None:
    backbone = make(bart).eval()
    perturb(backbone)
    batch = batch_of(backbone)
    # "blue" begins "blue circle", so the end of the text counts
    found = backbone.rankings(batch)
    for row, sample in enumerate(batch["samples"]):
        for option, score in zip(sample.options, found[row].tolist(), strict=True):
            assert score == pytest.approx(log_likelihood(backbone, batch, row, option, end=True), abs=1e-4)
    apart = [sample._replace(options=("red", "blue")) for sample in batch["samples"]]
    found = backbone.rankings(batch | {"samples": apart})
    assert found[0][1].item() == pytest.approx(log_likelihood(backbone, batch, 0, "blue", end=False), abs=1e-4)
    mixed = [apart[0], apart[1]._replace(options=()), apart[2]]
    assert [len(scores) for scores in backbone.rankings(batch | {"samples": mixed})] == [2, 0, 2]


def test_options_in_any_order_and_none_at_all(bart: Path) -> None:
    backbone = make(bart).eval()
    perturb(backbone)
    batch = batch_of(backbone)
    expected = backbone.rankings(batch)
    turned = [sample._replace(options=("blue circle", "red", "blue")) for sample in batch["samples"]]
    for scores, in_order in zip(backbone.rankings(batch | {"samples": turned}), expected, strict=True):
        torch.testing.assert_close(scores, in_order[[2, 0, 1]])
    none = [sample._replace(options=()) for sample in batch["samples"]]
    assert [scores.tolist() for scores in backbone.rankings(batch | {"samples": none})] == [[], [], []]


@pytest.mark.parametrize("weights", [None, [1.0, 0.3, 0.6]])
def test_a_batch_without_targets_costs_nothing(bart: Path, weights: list[float] | None) -> None:
    backbone = make(bart)
    batch = batch_of(backbone, weights)
    loss, tokens = backbone.loss(batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert (loss.item(), tokens) == (0.0, 0)
    loss.backward()  # as other processes do, which have targets
    grads = [p.grad for p in backbone.parameters() if p.requires_grad and p.grad is not None]
    assert grads
    assert not any(grad.any() for grad in grads)


def test_the_bias_of_logits_counts(bart: Path) -> None:
    backbone = make(bart).eval()
    batch = batch_of(backbone)
    model: Any = backbone.language_model
    model.final_logits_bias += torch.randn(model.final_logits_bias.shape, generator=torch.Generator().manual_seed(2))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")} | batch["vision"]
    torch.testing.assert_close(backbone.loss(batch)[0], model(**inputs).loss)


def log_likelihood(backbone: DoRAVLBart, batch: dict[str, Any], row: int, option: str, end: bool) -> float:
    ids = torch.tensor([backbone.tokenizer(option)["input_ids"]])
    ids = ids if end else ids[:, :-1]
    one = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
    one |= {name: tensor[row : row + 1] for name, tensor in batch["vision"].items()}
    read = torch.cat([torch.tensor([[backbone.tokenizer.eos_token_id]]), ids[:, :-1]], dim=1)
    log_probs = backbone.language_model(**one, decoder_input_ids=read).logits.log_softmax(-1)
    return log_probs.gather(2, ids[..., None]).sum().item()


def test_answers_are_those_of_prompts(bart: Path) -> None:
    backbone = make(bart).eval()
    perturb(backbone)
    batch = batch_of(backbone)
    answers = backbone.answers(batch, max_new_tokens=4, num_beams=2)
    prompts = [sample.prompt for sample in batch["samples"]]
    assert answers == backbone.generate(prompts, batch["vision"], max_new_tokens=4, num_beams=2)
    ranks = backbone.rank(prompts, [sample.options for sample in batch["samples"]], batch["vision"])
    for scores, expected in zip(ranks, backbone.rankings(batch), strict=True):
        torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("also", [(), ("visual_embedding",), ("biases",), ("layer_norms",), ("embeddings",)])
def test_what_trains(bart: Path, also: tuple[str, ...]) -> None:
    backbone = make(bart, also_trained=also)
    model = backbone.language_model
    trained = {name.replace("base_layer.", "") for name, p in model.named_parameters() if p.requires_grad}
    adapted = {f"{name}.{part}" for name, _ in adapter_layers(model) for part in ("lora_A", "lora_B", "magnitude")}
    expected = set(adapted)
    for name, _ in model.named_parameters():
        plain, inside = name.replace("base_layer.", ""), name.startswith("model.")
        if (
            ("visual_embedding" in also and name.startswith("visual_embedding"))
            or ("biases" in also and inside and name.endswith(".bias"))
            or ("layer_norms" in also and inside and "norm" in name)
            or ("embeddings" in also and inside and ("shared" in name or "embed_" in name))
        ):
            expected.add(plain)
    assert trained == expected
    # every attention of encoder and decoder, the decoder's own and that on the encoder
    assert len(list(adapter_layers(model))) == 2 * (2 + 2 * 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    perturb(model)
    optimizer = backbone.configure_optimizers()
    batch = batch_of(backbone)
    backbone.loss(batch)[0].backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
        elif "image_order" not in name and "box." not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name, name


def test_a_tower_trains_if_asked_to(bart: Path) -> None:
    parts = VLBartParts(str(bart), vision=OpenClipVision(config=TOWER))
    backbone = make(bart, parts=parts, also_trained=["visual_embedding", "vision_tower"])
    batch = batch_of(backbone)
    batch["vision"] = {"pixel_values": torch.randn(3, 3, 16, 16), "image_counts": torch.ones(3, dtype=torch.int64)}
    backbone.loss(batch)[0].backward()
    tower: Any = backbone.language_model.vision_tower
    assert all(parameter.grad is not None for parameter in tower.parameters())
    frozen = make(bart, parts=parts, also_trained=["visual_embedding"])
    assert not any(p.requires_grad for p in frozen.language_model.vision_tower.parameters())  # type: ignore[union-attr]
    # the adapter stays out of the tower, whatever its targets
    adapter = AdapterConfig(rank=4, target_modules="all-linear")
    everywhere = DoRAVLBart(parts, adapter)
    everywhere.configure_model()
    assert all(name.startswith("model.") for name, _ in adapter_layers(everywhere.language_model))


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_merged_model_equals_the_adapter_model(bart: Path, method: str) -> None:
    backbone = make(bart, method).eval()
    perturb(backbone)
    batch = batch_of(backbone)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | batch["vision"]
    labels = batch["labels"].clamp(min=0)
    with torch.no_grad():
        live = backbone.language_model(**inputs, labels=labels).logits
        assert (live - load_vl_bart(backbone.parts)(**inputs, labels=labels).logits).abs().max() > 1e-2
        merge_adapters(backbone.language_model)
        torch.testing.assert_close(backbone.language_model(**inputs, labels=labels).logits, live, atol=2e-4, rtol=1e-4)


# Liu et al. 2024, tables 2 and 3; scale 1, so alpha equals the rank and is of no influence on the count
@pytest.mark.parametrize(
    ("feature_dim", "also", "printed"),
    [(2048, ("visual_embedding", "biases", "layer_norms"), "5.96"), (512, ("visual_embedding", "biases"), "5.19")],
    ids=["image", "video"],
)
def test_share_of_the_paper(feature_dim: int, also: tuple[str, ...], printed: str) -> None:
    with torch.device("meta"):
        # bart-base: 50,265 tokens, and 200 that VL-T5 adds
        model = VLBart(VLBartConfig(**BART_BASE, vocab_size=50465, feature_dim=feature_dim))
    model.tie_weights()  # which transformers 5.0 does not do on this device
    base = sum(p.numel() for p in model.parameters())
    DoRAVLBart("unused", also_trained=also).inject(model)
    summary = summarize_adapters(model)
    d, attentions = 768, 6 + 6 + 6
    adapters = attentions * 2 * (128 * (d + d) + d)
    # feature and box with their norms, and the two orders of images
    visual = (feature_dim * d + d) + (5 * d + d) + 2 * 2 * d + 2 * d
    encoder_biases, decoder_biases = 4 * d + 3072 + d + 2 * d, 8 * d + 3072 + d + 3 * d
    biases = 6 * (encoder_biases + decoder_biases) + 2 * d
    norms = 6 * (2 * d + 3 * d) + 2 * d if "layer_norms" in also else 0
    assert summary.trainable == adapters + visual + biases + norms
    assert summary.total == base + adapters
    assert f"{100 * summary.share:.2f}" == printed


BART_BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}


def test_bart_base_is_the_model_counted() -> None:
    # 139,420,416 parameters, as the hub says of facebook/bart-base
    with torch.device("meta"):
        model = VLBart(VLBartConfig(**BART_BASE, vocab_size=50265))
    model.tie_weights()
    bart = sum(p.numel() for name, p in model.named_parameters() if name.startswith("model."))
    assert bart == 139_420_416
    assert BartConfig().vocab_size == 50265


def test_unknown_parts_are_refused(bart: Path) -> None:
    with pytest.raises(ValueError, match="unknown part 'visual'; there are visual_embedding"):
        DoRAVLBart(str(bart), also_trained=["visual"])
    with pytest.raises(ValueError, match="no vision tower to train"):
        make(bart, also_trained=["vision_tower"])


def test_hyperparameters_are_plain(bart: Path) -> None:
    parts = VLBartParts(str(bart), vision=OpenClipVision(config=TOWER))
    saved = json.loads(json.dumps(dict(DoRAVLBart(parts).hparams)))
    again = DoRAVLBart(saved["model_name_or_path"])
    assert again.parts == parts


def test_gradients_do_not_reach_what_is_frozen(bart: Path) -> None:
    backbone = make(bart, also_trained=())
    loss, _ = backbone.loss(batch_of(backbone))
    loss.backward()
    grads: dict[str, Tensor | None] = {name: p.grad for name, p in backbone.named_parameters() if not p.requires_grad}
    assert not any(grad is not None for grad in grads.values())


def test_half_precision_needs_autocast_beside_biases_that_train(bart: Path, make_trainer: Any) -> None:
    backbone = DoRAVLBart(VLBartParts(str(bart), feature_dim=C), AdapterConfig(rank=4), dtype="bfloat16")
    backbone.trainer = make_trainer()
    with pytest.raises(ValueError, match=r"also_trained: biases train in fp32.*bf16-mixed, or dtype to float32"):
        backbone.configure_model()
    backbone.trainer = make_trainer(precision="bf16-mixed")
    backbone.configure_model()
    batch = batch_of(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = backbone.loss(batch)
    loss.backward()
    # adapters alone keep to fp32 by themselves
    alone = make(bart, also_trained=("visual_embedding",), dtype="bfloat16")
    assert torch.isfinite(alone.loss(batch)[0])
