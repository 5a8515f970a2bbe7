"""A LLaVA put together from parts is those parts, and loads as any other."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_llava import IMAGE_TOKENS, SIDE, VISION, save_image, save_llava
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlava
from dora_lightning.llava_parts import LlavaParts, resolve_llava
from dora_lightning.processing import image_token_counts, load_processor


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(1)
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def inputs_of(folder: str, texts: list[str], images: list[Image.Image] | None) -> dict[str, Any]:
    processor = load_processor(folder)
    return dict(processor(text=texts, images=images, return_tensors="pt", padding=True))


@pytest.mark.parametrize("language", ["tiny_llama", "untied_llama"])
def test_text_alone_is_the_language_model_s(language: str, clip: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(language)
    model: Any = AutoModelForImageTextToText.from_pretrained(resolve_llava(LlavaParts(str(source), str(clip))))
    base: Any = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, base(ids).logits
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)
    assert model.config.tie_word_embeddings == base.config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == base.config.tie_word_embeddings


@pytest.mark.parametrize("class_token", [False, True])
def test_image_features_are_the_tower_s(tiny_llama: Path, clip: Path, tmp_path: Path, class_token: bool) -> None:
    folder = resolve_llava(LlavaParts(str(tiny_llama), str(clip), feature_layer=-2, class_token=class_token))
    image = Image.open(save_image(tmp_path / "image.png", 0))
    inputs = inputs_of(folder, ["<image> cold"], [image])
    assert image_token_counts(load_processor(folder), [image.size]) == [IMAGE_TOKENS + class_token]
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    tower: Any = CLIPVisionModel.from_pretrained(clip)
    seen: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    assert torch.equal(seen[0], hidden if class_token else hidden[:, 1:])


def test_a_tower_without_a_class_token(tiny_llama: Path, siglip: Path, tmp_path: Path) -> None:
    folder = resolve_llava(LlavaParts(str(tiny_llama), str(siglip)))
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    image = Image.open(save_image(tmp_path / "image.png", 0))
    inputs = inputs_of(folder, ["<image> cold"], [image])
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == IMAGE_TOKENS
    assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="class_token: SiglipVisionModel has none"):
        resolve_llava(LlavaParts(str(tiny_llama), str(siglip), class_token=True))


def test_a_new_tower_depends_on_the_seed_alone(tiny_llama: Path, cache: Path) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        folder = resolve_llava(LlavaParts(str(tiny_llama), VISION, seed=seed))
        state = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        return {name: tensor for name, tensor in state.items() if "language" not in name and tensor.ndim > 1}

    before = torch.random.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    shutil.rmtree(cache)
    torch.rand(3)
    again, other = weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any("projector" in name for name in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "position" not in n and "lm_head" not in n)


def test_it_is_made_once_and_again_when_a_part_changes(tmp_path: Path, tiny_llama: Path, cache: Path) -> None:
    language = tmp_path / "language"
    shutil.copytree(tiny_llama, language)
    parts = LlavaParts(str(language), VISION)
    folder = Path(resolve_llava(parts))
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_llava(parts) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert list((cache / "llava").iterdir()) == [folder]
    model = AutoModelForCausalLM.from_pretrained(language)
    model.model.norm.weight.data += 1
    model.save_pretrained(language)
    assert resolve_llava(parts) != str(folder)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_published_projector_is_read(tiny_llama: Path, clip: Path, tmp_path: Path, suffix: str) -> None:
    # LLaVA's own file: mm_projector.bin with the layers of a Sequential
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    tensors = {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in shapes.items()}
    path = tmp_path / f"mm_projector{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    folder = resolve_llava(LlavaParts(str(tiny_llama), str(clip), projector=str(path)))
    projector = AutoModelForImageTextToText.from_pretrained(folder).model.multi_modal_projector
    assert torch.equal(projector.linear_1.weight, tensors["model.mm_projector.0.weight"])
    assert torch.equal(projector.linear_2.bias, tensors["model.mm_projector.2.bias"])
    with pytest.raises(ValueError, match=r"projector: .* holds .*, but this tower and language model need"):
        resolve_llava(LlavaParts(str(tiny_llama), VISION | {"hidden_size": 32}, projector=str(path)))


def test_a_checkpoint_of_parts_loads_by_itself(tiny_llama: Path, tmp_path: Path, make_trainer: Any) -> None:
    module = DoRALlava(LlavaParts(str(tiny_llama), VISION), AdapterConfig(target_modules=["q_proj"]))
    trainer = make_trainer(max_steps=0)
    batch = {"input_ids": torch.tensor([[1, 5]]), "attention_mask": torch.ones(1, 2).long()}
    batches = DataLoader([batch | {"labels": batch["input_ids"]}], batch_size=None)
    trainer.fit(module, batches, batches)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = DoRALlava.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.parts == module.parts
    assert again.model_name_or_path == module.model_name_or_path


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"vision": {"hiden_size": 3}}, ValueError, "vision: 'hiden_size' is no field of CLIPVisionConfig"),
        ({"vision": "./none"}, FileNotFoundError, "no model folder at none"),
        ({"language": "./none"}, FileNotFoundError, "no model folder at none"),
        ({"projector": "./none.bin"}, FileNotFoundError, r"no projector file at none\.bin"),
        ({"vision": "language"}, ValueError, r"vision: .* is a llama model; expected one of clip"),
    ],
)
def test_parts_that_are_not_there(
    tiny_llama: Path, cache: Path, parts: dict[str, Any], error: type[Exception], message: str
) -> None:
    if parts.get("vision") == "language":
        parts = parts | {"vision": str(tiny_llama)}
    with pytest.raises(error, match=message):
        resolve_llava(LlavaParts(**({"language": str(tiny_llama), "vision": VISION} | parts)))
    # nothing half-made stays
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_tokenizer_that_has_the_token_keeps_it(tmp_path: Path) -> None:
    whole = save_llava(tmp_path / "llava")
    tokenizer = AutoTokenizer.from_pretrained(whole)
    language = tmp_path / "language"
    model: Any = AutoModelForImageTextToText.from_pretrained(whole)
    causal = AutoModelForCausalLM.from_config(model.config.text_config)
    causal.save_pretrained(language)
    tokenizer.save_pretrained(language)
    assembled = resolve_llava(LlavaParts(str(language), VISION))
    assert len(load_processor(assembled).tokenizer) == len(tokenizer)
    config = AutoModelForImageTextToText.from_pretrained(assembled).config
    assert config.text_config.vocab_size == 392
    assert config.image_token_index == tokenizer.convert_tokens_to_ids("<image>")
