"""VL-BART's encoder against a computation of its own from the weights, against plain BART, and its generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_vl_bart import TOWER, features, save_bart
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartForConditionalGeneration

from dora_lightning.open_clip_tower import OpenClipVision
from dora_lightning.vl_bart import VLBart, VLBartParts, load_vl_bart, load_vl_bart_tokenizer, resolve_vl_bart

C = 24


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path_factory.getbasetemp() / "vl-bart-cache"))


@pytest.fixture
def model(bart: Path) -> VLBart:
    return load_vl_bart(VLBartParts(str(bart), feature_dim=C)).double().eval()


def inputs(model: VLBart, samples: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(5, 200, (samples, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = model.config.pad_token_id, 0
    return {"input_ids": ids, "attention_mask": mask}


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def visual_tokens(weights: dict[str, Tensor], vision: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """``LN(feature) + LN(x1, y1, x2, y2, area) + image order + object order``, token by token."""
    table = weights["model.shared.weight"]
    tokens = []
    for b in range(len(vision["features"])):
        for v in range(vision["features"].shape[1]):
            x1, y1, x2, y2 = boxes[b, v].tolist()
            box = torch.tensor([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)], dtype=torch.float64)
            token = norm(
                linear(vision["features"][b, v].double(), weights, "visual_embedding.feature"),
                weights,
                "visual_embedding.feature_norm",
            )
            token = token + norm(linear(box, weights, "visual_embedding.box"), weights, "visual_embedding.box_norm")
            token = token + weights["visual_embedding.image_order.weight"][vision["image_order"][b, v]]
            # the last token of the vocabulary stands for the first object
            tokens.append(token + table[-1 - int(vision["object_order"][b, v])])
    return torch.stack(tokens).view(*vision["features"].shape[:2], -1)


def encoder_layer(x: Tensor, seen: Tensor, weights: dict[str, Tensor], name: str, heads: int) -> Tensor:
    """Attention and feed-forward, a norm behind each."""
    batch, length, width = x.shape
    query, key, value = (
        linear(x, weights, f"{name}.self_attn.{kind}_proj").view(batch, length, heads, -1).transpose(1, 2)
        for kind in "qkv"
    )
    scores = query @ key.transpose(2, 3) / (width // heads) ** 0.5
    scores = scores.masked_fill(~seen[:, None, None, :], -1e30)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
    x = norm(x + linear(mixed, weights, f"{name}.self_attn.out_proj"), weights, f"{name}.self_attn_layer_norm")
    hidden = F.gelu(linear(x, weights, f"{name}.fc1"))
    return norm(x + linear(hidden, weights, f"{name}.fc2"), weights, f"{name}.final_layer_norm")


def reference(model: VLBart, text: dict[str, Tensor], vision: dict[str, Tensor], boxes: Tensor) -> Tensor:
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    ids = text["input_ids"]
    places = weights["model.encoder.embed_positions.weight"][torch.arange(ids.shape[1]) + 2]  # BART's offset
    hidden = norm(weights["model.shared.weight"][ids] + places, weights, "model.encoder.layernorm_embedding")
    hidden = torch.cat([hidden, visual_tokens(weights, vision, boxes)], dim=1)
    seen = torch.cat([text["attention_mask"], vision["visual_mask"]], dim=1).bool()
    for layer in range(model.config.encoder_layers):
        hidden = encoder_layer(hidden, seen, weights, f"model.encoder.layers.{layer}", 4)
    return hidden


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_visual_embedding_and_joint_encoder(model: VLBart, images: int, attention: str) -> None:
    model.set_attn_implementation(attention)
    text, vision = inputs(model), features(3, images, rows=4, numbers=C)
    vision["visual_mask"][2, -1] = 0
    boxes = torch.rand(3, 4 * images, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for given in (boxes, None):
        hidden, mask = model.encode(**text, **vision, boxes=given)
        expected = reference(model, text, vision, torch.zeros_like(boxes) if given is None else boxes)
        seen = mask.bool()
        torch.testing.assert_close(hidden[seen], expected[seen], atol=1e-10, rtol=1e-9)
        assert mask.tolist() == torch.cat([text["attention_mask"], vision["visual_mask"]], 1).tolist()


def test_object_order_is_that_of_the_extra_tokens(bart: Path) -> None:
    tokenizer = load_vl_bart_tokenizer(str(bart))
    # VL-T5's: <extra_id_99> ... <extra_id_0>, then <vis_extra_id_99> ... <vis_extra_id_0>
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 1) == "<vis_extra_id_0>"
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 36) == "<vis_extra_id_35>"
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 101) == "<extra_id_0>"
    assert load_vl_bart(str(bart)).model.shared.num_embeddings == len(tokenizer)


def test_text_alone_is_plain_bart(model: VLBart, bart: Path) -> None:
    plain = BartForConditionalGeneration.from_pretrained(bart).double().eval()
    text = inputs(model)
    labels = torch.randint(5, 200, (3, 4), generator=torch.Generator().manual_seed(2))
    expected = plain(**text, labels=labels)
    found = model(**text, labels=labels)
    # the extra tokens add logits and nothing else
    torch.testing.assert_close(found.logits[..., : expected.logits.shape[-1]], expected.logits)
    hidden, _ = model.encode(**text)
    seen = text["attention_mask"].bool()
    torch.testing.assert_close(hidden[seen], plain.model.encoder(**text).last_hidden_state[seen])


def test_training_drops_what_plain_bart_drops(bart: Path) -> None:
    plain = BartForConditionalGeneration.from_pretrained(bart).train()
    model = load_vl_bart(VLBartParts(str(bart), feature_dim=C)).train()
    text = inputs(model)
    for module in (plain, model):
        module.model.encoder.dropout = 0.3
    torch.manual_seed(5)
    expected = plain.model.encoder(**text).last_hidden_state
    torch.manual_seed(5)
    hidden, _ = model.encode(**text)
    seen = text["attention_mask"].bool()
    torch.testing.assert_close(hidden[seen], expected[seen])
    # with every layer dropped, what is read goes through as it is
    model.model.encoder.layerdrop = 1.0
    model.model.encoder.dropout = 0.0
    encoder = model.model.encoder
    ids = text["input_ids"]
    read = encoder.layernorm_embedding(encoder.embed_tokens(ids) + encoder.embed_positions(ids))
    torch.testing.assert_close(model.encode(**text)[0], read)
    assert not torch.allclose(model.eval().encode(**text)[0], read)


def test_images_that_are_not_as_many_as_counted(bart: Path) -> None:
    model = load_vl_bart(VLBartParts(str(bart), vision=OpenClipVision(config=TOWER)))
    with pytest.raises(ValueError, match="image_counts says 4 images, and pixel_values holds 3"):
        model.encode(**inputs(model), pixel_values=torch.zeros(3, 3, 16, 16), image_counts=torch.tensor([1, 2, 1]))


def test_features_reach_the_answer_and_each_sample_sees_its_own(model: VLBart) -> None:
    text, vision = inputs(model), features(3, 1, rows=4, numbers=C)
    labels = torch.randint(5, 200, (3, 4), generator=torch.Generator().manual_seed(2))
    logits = model(**text, **vision, labels=labels).logits
    assert (logits - model(**text, labels=labels).logits).abs().max() > 1e-3
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in (text | vision).items()}
        torch.testing.assert_close(model(**alone, labels=labels[row : row + 1]).logits[0], logits[row])


def test_what_several_look_at_is_given_once(model: VLBart) -> None:
    text, vision = inputs(model), features(2, 1, rows=4, numbers=C)
    index = torch.tensor([1, 0, 1])
    shared, mask = model.encode(**text, **vision, visual_index=index)
    apart, own_mask = model.encode(**text, **{name: tensor[index] for name, tensor in vision.items()})
    torch.testing.assert_close(shared, apart)
    assert mask.tolist() == own_mask.tolist()


@pytest.mark.parametrize("kind", ["grid", "pooled"])
def test_pixels_go_through_the_tower(bart: Path, kind: Any) -> None:
    parts = VLBartParts(str(bart), vision=OpenClipVision(config=TOWER, features=kind), image_orders=3)
    model = load_vl_bart(parts).double().eval()
    assert model.vision_tower is not None
    text = inputs(model)
    pixels = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    hidden, mask = model.encode(**text, pixel_values=pixels, image_counts=torch.tensor([2, 3, 1]))
    rows = 4 if kind == "grid" else 1
    assert mask[:, 7:].sum(1).tolist() == [2 * rows, 3 * rows, rows]
    first = 0
    for row, count in enumerate([2, 3, 1]):
        seen = model.vision_tower(pixels[first : first + count])  # [count, rows, C]
        first += count
        vision = features(1, count, rows, seen.shape[-1])
        vision["features"] = seen.flatten(0, 1)[None]
        if kind == "pooled":  # frames of a video: objects of one image
            vision["image_order"], vision["object_order"] = vision["object_order"], vision["image_order"]
        own, own_mask = model.encode(**{name: tensor[row : row + 1] for name, tensor in text.items()}, **vision)
        torch.testing.assert_close(hidden[row, mask[row].bool()], own[0, own_mask[0].bool()])


def test_a_tower_that_is_frozen_stays_in_evaluation_mode(bart: Path) -> None:
    model = load_vl_bart(VLBartParts(str(bart), vision=OpenClipVision(config=TOWER)))
    assert model.vision_tower is not None
    model.train()
    assert model.vision_tower.training
    model.vision_tower.requires_grad_(False)
    model.train()
    assert model.training
    assert not model.vision_tower.training


def test_a_folder_is_the_model(bart: Path, tmp_path: Path) -> None:
    parts = VLBartParts(str(bart), vision=OpenClipVision(config=TOWER), seed=5)
    folder = resolve_vl_bart(parts)
    assert resolve_vl_bart(parts) == folder  # made once
    assert resolve_vl_bart(folder) == folder
    model = load_vl_bart(folder)
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(folder), VLBart)
    assert AutoConfig.from_pretrained(folder).vision == parts.vision.to_dict()  # type: ignore[union-attr]
    for name, tensor in load_vl_bart(parts).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
    assert resolve_vl_bart(VLBartParts(str(bart), vision=OpenClipVision(config=TOWER), seed=6)) != folder


def test_generation_is_greedy_step_by_step(model: VLBart, bart: Path) -> None:
    from dora_lightning.backbones.seq2seq import generate_targets

    tokenizer = load_vl_bart_tokenizer(str(bart))
    text, vision = inputs(model), features(3, 1, rows=4, numbers=C)
    hidden, mask = model.encode(**text, **vision)
    ids = torch.full((3, 1), tokenizer.eos_token_id)  # BART's decoder starts with it
    for _ in range(5):
        logits = model(**text, **vision, decoder_input_ids=ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    ids[:, -1] = tokenizer.eos_token_id  # forced where the limit is
    expected = []
    for row in ids[:, 1:].tolist():
        ended = row.index(tokenizer.eos_token_id)
        expected.append(tokenizer.decode(row[:ended], skip_special_tokens=True).strip())
    assert generate_targets(model, tokenizer, hidden, mask, num_beams=1, max_new_tokens=5) == expected
    assert any(expected)


def test_beams_of_a_batch_are_those_of_each_alone(model: VLBart, bart: Path) -> None:
    from dora_lightning.backbones.seq2seq import generate_targets

    tokenizer = load_vl_bart_tokenizer(str(bart))
    hidden, mask = model.encode(**inputs(model), **features(3, 1, rows=4, numbers=C))
    together = generate_targets(model, tokenizer, hidden, mask, num_beams=3, max_new_tokens=5)
    alone = []
    for row in range(3):
        seen = mask[row].bool()
        alone += generate_targets(
            model, tokenizer, hidden[row, seen][None], mask[row, seen][None], num_beams=3, max_new_tokens=5
        )
    assert together == alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 4, C + 1)}, r"25 numbers, and this model reads 24"),
        ({"image_order": torch.full((3, 4), 2)}, r"image order 2: this model tells 2 apart"),
        ({"object_order": torch.full((3, 4), 100)}, r"object order 100: this model tells 100 apart"),
        ({"pixel_values": torch.zeros(3, 3, 8, 8)}, r"no vision tower"),
        ({"colours": torch.zeros(3)}, r"unknown visual input 'colours'"),
    ],
)
def test_wrong_inputs(model: VLBart, change: dict[str, Tensor], message: str) -> None:
    vision = features(3, 1, rows=4, numbers=C)
    if "pixel_values" in change:
        vision = {"image_counts": torch.ones(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        model.encode(**inputs(model), **(vision | change))


@pytest.mark.parametrize(
    "names",
    [
        ("features",),
        ("features", "image_order", "object_order"),
        ("boxes",),
        ("visual_index",),
        ("pixel_values",),
        ("pixel_values", "image_counts", "boxes"),
        ("pixel_values", "image_counts", "features"),
    ],
    ids=" ".join,
)
def test_inputs_that_are_not_all_there(model: VLBart, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"expected visual inputs features, .* found {', '.join(names)}$"):
        model.encode(**inputs(model), **dict.fromkeys(names, torch.zeros(3)))


def test_orders_too_large_are_never_looked_up(bart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = VLBartParts(str(bart), vision=OpenClipVision(config=TOWER, features="pooled"), object_orders=3)
    model = load_vl_bart(parts)
    frames = {"pixel_values": torch.zeros(12, 3, 16, 16), "image_counts": torch.full((3,), 4)}
    with pytest.raises(ValueError, match=r"object order 3: this model tells 3 apart \(object_orders\)"):
        model.encode(**inputs(model), **frames)
    # where orders are not looked at, on a GPU, the embedding itself must fail
    monkeypatch.setattr(type(model.visual_embedding), "check_orders", lambda *_: None)
    with pytest.raises(IndexError):
        model.encode(**inputs(model), **frames)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "x"}, "a pretrained BART has its own"),
        ({"language": {"d_model": 8}}, "a new BART needs one"),
        ({"language": {"d_modle": 8}, "tokenizer": ["a"]}, "'d_modle' is no field of BartConfig"),
        ({"language": {"vocab_size": 8}, "tokenizer": ["a"]}, "'vocab_size' is no field of BartConfig to choose"),
        ({"vision": OpenClipVision(config=TOWER), "feature_dim": 3}, "feature_dim is that of the tower"),
    ],
)
def test_parts_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLBartParts(**({"language": "somewhere"} | options))


def test_a_model_of_another_kind(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="is a llama model; expected a BART or a VL-BART"):
        resolve_vl_bart(str(tiny_llama))
