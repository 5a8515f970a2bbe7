"""DoRALlava: equal to PEFT and to transformers, what trains and what stays, and the model it leaves behind."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from tiny import MakeTrainer, perturb_adapters
from tiny_llava import save_image, save_llava
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from dora_lightning import AdapterConfig, save_peft_adapter
from dora_lightning.adapters import adapter_layers
from dora_lightning.backbones import DoRALlava
from dora_lightning.callbacks import GroupLearningRates, MergeOnSave
from dora_lightning.images import open_image

MakeLlava = Callable[..., DoRALlava]
PROMPTS = ["<image>\nQuestion: is it cold?\nAnswer:", "user: <image> <image> or <image>? assistant:", "Please choose"]
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava_next"), next_generation=True)


@pytest.fixture(params=["llava", "llava_next"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def make_llava(llava: Path) -> MakeLlava:
    """Makes a DoRALlava on the tiny LLaVA, or on the folder given; the model is there already."""

    def make(source: Any = llava, adapter: dict[str, Any] | None = None, lr: float = 0.01, **options: Any) -> DoRALlava:
        config = AdapterConfig(**({"rank": 4, "target_modules": ATTENTION} | (adapter or {})))
        torch.manual_seed(0)
        module = DoRALlava(str(source), config, partial(AdamW, lr=lr), **options)
        module.configure_model()
        return module

    return make


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("images")
    sizes = [(16, 16), (40, 16), (20, 30), (16, 48)]
    return [open_image(save_image(folder / f"{seed}.png", seed, size)) for seed, size in enumerate(sizes)]


def make_batch(folder: Path, texts: list[str], images: list[Image.Image]) -> dict[str, Any]:
    """A batch as the processor of transformers makes it; every token after the images is supervised."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    encoded = dict(
        processor(text=texts, images=images or None, return_tensors="pt", padding=True, padding_side="right")
    )
    batch = {name: encoded.pop(name) for name in ("input_ids", "attention_mask")}
    unsupervised = (batch["input_ids"] == processor.image_token_id) | (batch["attention_mask"] == 0)
    batch["labels"] = batch["input_ids"].masked_fill(unsupervised, -100)
    vision = {name: encoded[name] for name in ("pixel_values", "image_sizes") if name in encoded}
    return batch | ({"vision": vision} if vision else {})


def trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def fit(module: DoRALlava, batch: dict[str, Any], trainer: Any) -> None:
    batches = DataLoader([batch] * 3, batch_size=None)
    trainer.fit(module, batches, batches)


# Against transformers and PEFT ---------------------------------------------------------------------------------------


def test_loss_is_that_of_transformers(folder: Path, make_llava: MakeLlava, images: list[Image.Image]) -> None:
    module = make_llava(folder)
    batch = make_batch(folder, PROMPTS, images)
    loss, tokens = module.loss(batch)
    base: Any = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(loss, base(**inputs, **batch["vision"]).loss)
    assert tokens == int((batch["labels"][:, 1:] != -100).sum())


def test_texts_are_those_of_transformers(folder: Path, make_llava: MakeLlava, images: list[Image.Image]) -> None:
    module = make_llava(folder)
    module.eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    base: Any = AutoModelForImageTextToText.from_pretrained(folder)
    vision = make_batch(folder, PROMPTS, images)["vision"]
    options = {"max_new_tokens": 8, "do_sample": False}
    written = module.generate(PROMPTS, vision, **options)
    remaining = iter(images)
    for prompt, text in zip(PROMPTS, written, strict=True):
        own = [next(remaining) for _ in range(prompt.count("<image>"))]
        inputs = processor(text=[prompt], images=own or None, return_tensors="pt")
        ids = base.generate(**inputs, pad_token_id=0, **options)[0, inputs["input_ids"].shape[1] :]
        assert text == processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(written)) == len(written)


def test_ranks_are_log_likelihoods(folder: Path, make_llava: MakeLlava, images: list[Image.Image]) -> None:
    module = make_llava(folder)
    module.eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    base: Any = AutoModelForImageTextToText.from_pretrained(folder)
    vision = make_batch(folder, PROMPTS, images)["vision"]
    options = [(" cold", " hot", " it is hot"), (" answer1", " true"), (" x", " y z")]
    scores = module.rank(PROMPTS, options, vision)
    remaining = iter(images)
    for prompt, own_options, ours in zip(PROMPTS, options, scores, strict=True):
        own = [next(remaining) for _ in range(prompt.count("<image>"))]
        for option, score in zip(own_options, ours, strict=True):
            inputs = processor(text=[prompt + option], images=own or None, return_tensors="pt")
            added = len(processor.tokenizer(prompt + option).input_ids) - len(processor.tokenizer(prompt).input_ids)
            log_probs = base(**inputs).logits[0, -added - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(1, inputs["input_ids"][0, -added:, None]).sum()
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks transformers by the old name
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_adapters_equal_peft_s(
    llava: Path, make_llava: MakeLlava, images: list[Image.Image], tmp_path: Path, method: str
) -> None:
    from peft import PeftModel

    module = make_llava(adapter={"method": method, "target_modules": "all-linear"}, projector="frozen")
    perturb_adapters(module)
    save_peft_adapter(module.language_model, tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(llava)
    theirs: Any = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert not any("vision" in name or "projector" in name for name, p in theirs.named_parameters() if p.requires_grad)
    batch = make_batch(llava, PROMPTS, images)
    loss, _ = module.loss(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = theirs(**inputs, **batch["vision"]).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    spelling = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
    spelling |= {"magnitude": "lora_magnitude_vector.default.weight"}
    gradients = dict(theirs.named_parameters())
    for name, layer in adapter_layers(module.language_model):
        for ours, their in spelling.items():
            if hasattr(layer, ours):
                torch.testing.assert_close(
                    getattr(layer, ours).grad, gradients[f"base_model.model.{name}.{their}"].grad, rtol=1e-4, atol=1e-6
                )


# What trains ---------------------------------------------------------------------------------------------------------


def test_adapters_are_in_the_language_model_alone(make_llava: MakeLlava) -> None:
    # both towers have projections of these names
    for targets in (ATTENTION, "all-linear", r".*(q_proj|v_proj)"):
        module = make_llava(adapter={"target_modules": targets})
        names = [name for name, _ in adapter_layers(module.language_model)]
        assert names
        assert all(name.startswith("model.language_model.") for name in names)


@pytest.mark.parametrize("excluded", [["layers.0.self_attn.q_proj"], r".*layers\.0\.self_attn\.q_proj"])
def test_what_is_excluded_stays_so(make_llava: MakeLlava, excluded: Any) -> None:
    module = make_llava(adapter={"exclude_modules": excluded})
    names = {name.removeprefix("model.language_model.layers.") for name, _ in adapter_layers(module.language_model)}
    assert names == {"0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"}


@pytest.mark.parametrize("tower", ["frozen", "full", "adapted"])
@pytest.mark.parametrize("projector", ["frozen", "full", "adapted"])
def test_each_part_trains_as_it_is_told(
    llava: Path,
    make_llava: MakeLlava,
    make_trainer: MakeTrainer,
    images: list[Image.Image],
    tower: Any,
    projector: Any,
) -> None:
    targets = [*ATTENTION, *(["linear_1", "linear_2"] if projector == "adapted" else [])]
    module = make_llava(adapter={"target_modules": targets}, vision_tower=tower, projector=projector)
    fit(module, make_batch(llava, PROMPTS, images), make_trainer())
    base = dict(AutoModelForImageTextToText.from_pretrained(llava).named_parameters())
    changed, unchanged, adapters = set(), set(), set()
    for name, parameter in module.language_model.named_parameters():
        part = "tower" if "vision_tower" in name else "projector" if "projector" in name else "language"
        original = base.get(name.replace(".base_layer.", "."))
        if original is None:
            adapters.add(part)
        elif torch.equal(parameter, original):
            unchanged.add(part)
        else:
            changed.add(part)
    assert changed == {part for part, how in (("tower", tower), ("projector", projector)) if how == "full"}
    assert adapters == {"language"} | {p for p, how in (("tower", tower), ("projector", projector)) if how == "adapted"}
    # the class token's last layer norm is not read, so a part of a tower that trains never moves
    assert unchanged - {"tower"} == {"language", "projector"} - changed


def test_a_part_without_targets_is_not_adapted_in_silence(make_llava: MakeLlava) -> None:
    with pytest.raises(ValueError, match=r"projector: adapted, but .* end in: linear_1, linear_2"):
        make_llava(projector="adapted")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_trains_is_fp32_on_a_bf16_base(
    llava: Path, make_llava: MakeLlava, make_trainer: MakeTrainer, images: list[Image.Image], precision: str
) -> None:
    module = make_llava(vision_tower="full", dtype="bfloat16")
    before = trained(module)
    assert {p.dtype for p in before.values()} == {torch.float32}
    assert module.language_model.get_input_embeddings().weight.dtype == torch.bfloat16
    fit(module, make_batch(llava, PROMPTS, images), make_trainer(precision=precision))
    moved = {name for name, p in trained(module).items() if not torch.equal(p, before[name])}
    assert {"projector", "tower"} <= {part for part in ("projector", "tower") for name in moved if part in name}


def test_each_part_has_a_rate_of_its_own(
    llava: Path, make_llava: MakeLlava, make_trainer: MakeTrainer, images: list[Image.Image]
) -> None:
    rates = GroupLearningRates(modules={"multi_modal_projector": {"lr": 2e-5}, "vision_tower": {"lr": 3e-6}})
    module = make_llava(vision_tower="full", lr=2e-4)
    trainer = make_trainer(callbacks=[rates])
    fit(module, make_batch(llava, PROMPTS, images), trainer)
    names = {id(p): name for name, p in module.named_parameters()}
    for group in trainer.optimizers[0].param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            expected = 2e-5 if "projector" in name else 3e-6 if "tower" in name else 2e-4
            assert group["lr"] == pytest.approx(expected)


def test_text_alone_gives_what_trains_outside_a_gradient_of_zero(llava: Path, make_llava: MakeLlava) -> None:
    module = make_llava(vision_tower="full")
    loss, _ = module.loss(make_batch(llava, PROMPTS[2:], []))
    loss.backward()
    outside = {name: p for name, p in module.named_parameters() if p.requires_grad and "language_model.l" not in name}
    assert outside
    assert all(p.grad is not None and not p.grad.any() for p in outside.values())
    inside = [p for name, p in module.named_parameters() if p.requires_grad and name not in outside]
    assert any(p.grad.any() for p in inside if p.grad is not None)


def test_gradient_checkpointing_gives_the_same_gradients(
    llava: Path, make_llava: MakeLlava, images: list[Image.Image]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        module = make_llava(gradient_checkpointing=checkpointing, vision_tower="full")
        perturb_adapters(module)
        module.loss(make_batch(llava, PROMPTS, images))[0].backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


# Cached features -----------------------------------------------------------------------------------------------------


def test_cached_features_are_the_tower_s(
    folder: Path, make_llava: MakeLlava, images: list[Image.Image], tmp_path: Path
) -> None:
    batch = make_batch(folder, PROMPTS, [*images[:3], images[0]])
    expected = make_llava(folder).loss(batch)[0]
    module = make_llava(folder, feature_cache=str(tmp_path))
    cache: Any = module.language_model.model.vision_tower.forward
    assert torch.equal(module.loss(batch)[0], expected)
    seen = cache.computed
    assert cache.read == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == seen  # the image that comes twice is one
    assert torch.equal(module.loss(batch)[0], expected)
    assert (cache.read, cache.computed) == (seen, seen)
    # another process of the same run, and another batch
    again = make_llava(folder, feature_cache=str(tmp_path))
    texts = again.generate(PROMPTS[:1], make_batch(folder, PROMPTS[:1], images[:1])["vision"], max_new_tokens=3)
    assert again.language_model.model.vision_tower.forward.computed == 0
    assert texts == make_llava(folder).generate(
        PROMPTS[:1], make_batch(folder, PROMPTS[:1], images[:1])["vision"], max_new_tokens=3
    )


def test_features_of_another_tower_or_precision_are_not_read(
    llava: Path, make_llava: MakeLlava, images: list[Image.Image], tmp_path: Path
) -> None:
    other = save_llava(tmp_path / "other", seed=1)
    batch = make_batch(llava, PROMPTS, images)
    for source, options in ((llava, {}), (other, {}), (llava, {"dtype": "bfloat16"})):
        module = make_llava(source, feature_cache=str(tmp_path / "cache"), **options)
        module.loss(batch)
        assert module.language_model.model.vision_tower.forward.read == 0
    module = make_llava(feature_cache=str(tmp_path / "cache"))
    with torch.autocast("cpu", torch.bfloat16):
        module.loss(batch)
    assert module.language_model.model.vision_tower.forward.read == 0  # the weights are fp32, the features bf16


def test_a_file_that_was_cut_short_is_computed_anew(
    llava: Path, make_llava: MakeLlava, images: list[Image.Image], tmp_path: Path
) -> None:
    module = make_llava(feature_cache=str(tmp_path))
    batch = make_batch(llava, PROMPTS, images)
    expected = module.loss(batch)[0]
    broken = next(tmp_path.rglob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:50])
    assert torch.equal(module.loss(batch)[0], expected)
    assert module.language_model.model.vision_tower.forward.computed == 5
    assert not list(tmp_path.rglob("*.partial"))


def test_a_tower_that_trains_has_no_cache(make_llava: MakeLlava, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="feature_cache needs a frozen vision tower; this one is full"):
        make_llava(vision_tower="full", feature_cache=str(tmp_path))


# What is left --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [("frozen", "frozen"), ("frozen", "full"), ("full", "adapted")])
def test_the_merged_model_is_the_adapted_one(
    folder: Path,
    make_llava: MakeLlava,
    make_trainer: MakeTrainer,
    images: list[Image.Image],
    tmp_path: Path,
    training: tuple[Any, Any],
) -> None:
    tower, projector = training
    module = make_llava(folder, adapter={"target_modules": "all-linear"}, vision_tower=tower, projector=projector)
    batch = make_batch(folder, PROMPTS, images)
    fit(module, batch, make_trainer(callbacks=[MergeOnSave("fit_end", dirpath=str(tmp_path / "merged"))]))
    merged: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | batch["vision"]
    with torch.no_grad():
        ours, plain = module.language_model.eval()(**inputs).logits, merged(**inputs).logits
        base: Any = AutoModelForImageTextToText.from_pretrained(folder)
        assert (base(**inputs).logits - plain).abs().max() > 0.1
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)
    AutoProcessor.from_pretrained(tmp_path / "merged")


def test_a_checkpoint_holds_what_trains_and_loads_by_itself(
    llava: Path, make_llava: MakeLlava, make_trainer: MakeTrainer, images: list[Image.Image], tmp_path: Path
) -> None:
    module = make_llava(vision_tower="adapted", adapter={"exclude_modules": r".*layers\.0.*q_proj"})
    trainer = make_trainer()
    fit(module, make_batch(llava, PROMPTS, images), trainer)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == trained(module).keys()
    again = DoRALlava.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    for name, parameter in trained(again).items():
        assert torch.equal(parameter, trained(module)[name])


# Bad input -----------------------------------------------------------------------------------------------------------


def test_images_and_their_places_must_agree(llava: Path, make_llava: MakeLlava, images: list[Image.Image]) -> None:
    module = make_llava()
    vision = make_batch(llava, PROMPTS, images)["vision"]
    with pytest.raises(ValueError, match=r"the prompts have 1 <image> and there are 4 images"):
        module.generate(PROMPTS[:1], vision)
    with pytest.raises(ValueError, match=r"the prompts have 4 <image> and there are 0 images"):
        module.rank(PROMPTS, [("a", "b")] * 3)


def test_a_language_model_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="is no model that reads images and text"):
        DoRALlava(str(tiny_llama), AdapterConfig()).configure_model()


def test_testing_needs_a_task(
    llava: Path, make_llava: MakeLlava, make_trainer: MakeTrainer, images: list[Image.Image]
) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match="testing needs a task"):
        make_trainer().test(make_llava(), DataLoader([make_batch(llava, PROMPTS, images)], batch_size=None))
