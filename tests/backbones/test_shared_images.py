"""Questions that share a row with their image: the loss and gradients are those of the questions apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import perturb_adapters
from tiny_llava import IMAGE_TOKENS, save_image, save_llava
from transformers import AutoTokenizer

from datamodules import Stage, VisionDataModule
from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlava
from dora_lightning.data import Sample


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("llava")))


class Questions(VisionDataModule):
    """Questions about three images and about none, each alone."""

    def __init__(self, folder: Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, num_workers=0, batch_size=64, **options)
        self.folder = folder

    def build_samples(self, stage: Stage) -> list[Sample]:
        assert self.template is not None
        samples = []
        questions = ["is it cold?", "is it hot or cold?", "cold?", "is it cold?", "true or false", "it is"]
        for number, question in enumerate(questions if stage == "train" else []):
            image = self.folder / f"{number % 2}.png" if number < 5 else None
            text = f"<image>\n{question}" if image else question
            prompt, target, answered = self.template.sample_text([(text, f"answer{number}")])
            samples.append(Sample(prompt, target, images=(image,) if image else (), answered=answered))
        return samples


def batches_of(llava: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    data = Questions(folder, llava, **options)
    data.setup("fit")
    dataset = data._datasets["train"]
    collate = data.collator()
    # by modality, as the sampler does it
    images = [index for index, item in enumerate(dataset.encoded) if item.sample.images]
    return [collate(dataset[images]), collate(dataset[[i for i in range(len(dataset)) if i not in images]])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        save_image(tmp_path / f"{number}.png", number)
    return tmp_path


def gradients(llava: str, batch: dict[str, Any], attention: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = DoRALlava(
        llava,
        AdapterConfig(rank=4, target_modules=["q_proj", "up_proj"]),
        vision_tower="full",
        attn_implementation=attention,
    )
    module.configure_model()
    perturb_adapters(module)
    loss, _ = module.loss(batch)
    loss.backward()
    return loss, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_those_of_the_questions_apart(llava: str, folder: Path, attention: str) -> None:
    apart, shared = (batches_of(llava, folder, share_images=share)[0] for share in (False, True))
    assert len(apart["vision"]["pixel_values"]) == 5
    assert len(shared["vision"]["pixel_values"]) == len(shared["input_ids"]) == 2
    assert shared["attention_mask"].sum() < 0.8 * apart["attention_mask"].sum()
    expected, theirs = gradients(llava, apart, attention)
    loss, ours = gradients(llava, shared, attention)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_row_holds_each_question_and_the_image_once(llava: str, folder: Path) -> None:
    with_images, text_alone = batches_of(llava, folder, share_images=True)
    assert "turns" not in text_alone
    turns, labels = with_images["turns"], with_images["labels"]
    for row, count in zip(range(2), (3, 2), strict=True):
        assert turns[row].unique().tolist() == list(range(count + 1))
        assert (labels[row][turns[row] == 0] == -100).all()
        for turn in range(1, count + 1):
            assert (labels[row][turns[row] == turn] != -100).any()
    image_token = AutoTokenizer.from_pretrained(llava).convert_tokens_to_ids("<image>")
    assert ((with_images["input_ids"] == image_token).sum(dim=1) == IMAGE_TOKENS).all()


def test_a_row_is_no_longer_than_the_cutoff(llava: str, folder: Path) -> None:
    whole = batches_of(llava, folder, share_images=True)[0]
    longest = int(whole["attention_mask"].sum(dim=1).max())
    cut = batches_of(llava, folder, share_images=True, cutoff_len=longest - 1)[0]
    assert len(cut["input_ids"]) == 3
    assert int((cut["labels"] != -100).sum()) == int((whole["labels"] != -100).sum())


def test_an_attention_without_masks_is_refused(llava: str, folder: Path) -> None:
    module = DoRALlava(llava, AdapterConfig(target_modules=["q_proj"]))
    module.configure_model()
    module.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="rows that share an image need the attention sdpa or eager"):
        module.loss(batches_of(llava, folder, share_images=True)[0])
