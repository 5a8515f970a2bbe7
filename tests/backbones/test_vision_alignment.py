"""The first stage of a new tower: it learns what is asked about, leaves the language model alone, and runs once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny import MakeTrainer
from tiny_llava import SIDE, save_llava

from datamodules import Stage, VisionDataModule
from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlava
from dora_lightning.backbones.vision_alignment import QuestionedImages, VisionAlignment, align_vision
from dora_lightning.data import Sample

COLOURS = {"hot": (200, 30, 30), "cold": (30, 30, 200), "true": (30, 200, 30)}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("llava")))


class Colours(VisionDataModule):
    """Plain images with a word for each colour, and whether it is the first of them."""

    def __init__(self, folder: Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, num_workers=0, batch_size=8, **options)
        self.folder = folder

    def build_samples(self, stage: Stage) -> list[Sample]:
        assert self.template is not None
        samples = []
        for number in range(24 if stage == "train" else 0):
            word, colour = list(COLOURS.items())[number % 3]
            path = self.folder / f"{number}.png"
            Image.new("RGB", (SIDE, SIDE), tuple(c + number % 7 for c in colour)).save(path)  # type: ignore[arg-type]
            turns = [("<image>\nwhich?", word), ("is it hot?", "answer1" if word == "hot" else "answer2")]
            for asked in (
                [turns] if self.share_images is False else [turns[:1], [(f"<image>\n{turns[1][0]}", turns[1][1])]]
            ):
                prompt, target, answered = self.template.sample_text(asked)
                samples.append(Sample(prompt, target, images=(path,), answered=answered))
        return samples


def questioned(llava: str, folder: Path, **options: Any) -> tuple[QuestionedImages, Colours]:
    data = Colours(folder, llava, **options)
    data.setup("fit")
    images = QuestionedImages()
    for batch in data.train_dataloader():
        images.add(batch, data._image_token_id)
    return images, data


def make(llava: str, **options: Any) -> DoRALlava:
    module = DoRALlava(llava, AdapterConfig(rank=4, target_modules=["q_proj"]), vision_tower="full", **options)
    module.configure_model()
    return module


@pytest.mark.parametrize("share_images", [False, True])
def test_questions_and_answers_are_read_out_of_batches(llava: str, tmp_path: Path, share_images: bool) -> None:
    images, data = questioned(llava, tmp_path, share_images=share_images)
    assert data.tokenizer is not None
    assert len(images.pixels) == 24
    assert all(len(asked) == 2 for asked in images.asked)
    questions = {number: data.tokenizer.decode(tokens) for tokens, number in images.questions.items()}
    answers = {number: data.tokenizer.decode(tokens) for tokens, number in images.answers.items()}
    assert len(questions) == 2
    assert {text.replace("</s>", "").strip() for text in answers.values()} == {*COLOURS, "answer1", "answer2"}
    for pixels, asked in zip(images.pixels, images.asked, strict=True):
        red, green, blue = pixels.mean(dim=(1, 2))
        word = "hot" if red > max(green, blue) else "cold" if blue > green else "true"
        (which, first), (hot, second) = asked
        assert "which?" in questions[which]
        assert "is it hot?" in questions[hot]
        assert word in answers[first]
        assert ("answer1" if word == "hot" else "answer2") in answers[second]
        assert "<image>" not in questions[which]


def test_the_features_tell_the_answers_and_are_as_long_as_words(llava: str, tmp_path: Path) -> None:
    images, _ = questioned(llava, tmp_path)
    module = make(llava)
    model: Any = module.language_model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    how = VisionAlignment(epochs=30, batch_size=8, lr=3e-3)
    share = align_vision(model, model.model.multi_modal_projector, images, how)
    assert share > 0.95
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("vision_tower" in name or "projector" in name for name in changed)
    features = model.model.get_image_features(pixel_values=torch.stack(images.pixels))
    tokens = torch.cat(list(getattr(features, "pooler_output", features)))
    words = model.get_input_embeddings().weight.norm(dim=-1).median()
    torch.testing.assert_close(tokens.norm(dim=-1).mean(), words, rtol=1e-3, atol=1e-4)
    # the same again, whatever was drawn before
    torch.rand(5)
    again: Any = make(llava).language_model
    align_vision(again, again.model.multi_modal_projector, images, how)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        if name in changed:
            assert torch.equal(ours, theirs)


def test_it_takes_two_answers(llava: str) -> None:
    model: Any = make(llava).language_model
    with pytest.raises(ValueError, match="0 conversations about one image and 0 different answers"):
        align_vision(model, model.model.multi_modal_projector, QuestionedImages(), VisionAlignment())
    with pytest.raises(ValueError, match="this reads image_sizes too"):
        QuestionedImages().add({"vision": {"pixel_values": torch.zeros(1), "image_sizes": torch.zeros(1, 2)}}, 3)
    with pytest.raises(ValueError, match=r"vision_alignment\.epochs must be at least 1"):
        VisionAlignment(epochs=0)
    with pytest.raises(ValueError, match="trains the projector in full; this one is frozen"):
        DoRALlava(llava, AdapterConfig(), projector="frozen", vision_alignment=VisionAlignment())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_begins_with_it_and_a_resumed_one_does_not(
    llava: str, tmp_path: Path, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(steps: int, checkpoint: Path | None = None) -> Any:
        caplog.clear()
        saved = ModelCheckpoint(tmp_path / str(steps), "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(max_epochs=-1, max_steps=steps, limit_val_batches=0, callbacks=[saved])
        module = DoRALlava(
            llava,
            AdapterConfig(rank=4, target_modules=["q_proj"]),
            vision_tower="full",
            vision_alignment=VisionAlignment(epochs=2),
        )
        torch.manual_seed(0)
        trainer.fit(module, datamodule=Colours(tmp_path, llava), ckpt_path=checkpoint, weights_only=True)
        return torch.load(saved.best_model_path, weights_only=True)["state_dict"]

    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        whole = fit(2)
        assert caplog.text.count("Aligning images with words") == 2
        fit(1)
        resumed = fit(2, next((tmp_path / "1").glob("*.ckpt")))
        assert "Aligning" not in caplog.text
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)
