"""generate and merge on a LLaVA: the checkpoint, the merged folder and transformers alone give the same text."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import MakeTrainer, perturb_adapters
from tiny_llava import save_image, save_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlava
from dora_lightning.images import pad_to_square
from dora_lightning.offline import generate, merge


@pytest.fixture(params=[False, True], ids=["llava", "llava_next"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, make_trainer: MakeTrainer) -> str:
    llava = save_llava(tmp_path / "llava", next_generation=request.param)
    torch.manual_seed(0)
    module = DoRALlava(str(llava), AdapterConfig(rank=4, target_modules=["q_proj", "up_proj"]))
    module.configure_model()
    perturb_adapters(module)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    return str(tmp_path / "adapter.ckpt")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return save_image(tmp_path / "image.png", 0, (40, 20))


def test_an_image_is_asked_about(
    checkpoint: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(checkpoint, str(tmp_path / "merged"))
    capsys.readouterr()
    written = []
    for model in (checkpoint, str(tmp_path / "merged")):
        generate(model, prompt="is it hot?", image=str(image), template="none", max_new_tokens=10)
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    # by transformers alone
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    network = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    picture = Image.open(image)
    if not hasattr(processor.image_processor, "image_grid_pinpoints"):
        picture = pad_to_square(picture, tuple(int(255 * mean) for mean in processor.image_processor.image_mean))
    inputs = processor(text="<image>\nis it hot?", images=picture, return_tensors="pt")
    ids = network.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=0)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert written[0].strip() == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    # without the image, and by the chat template
    generate(checkpoint, prompt="is it hot?", template="none", max_new_tokens=10)
    assert capsys.readouterr().out != written[0]
    generate(checkpoint, prompt="is it hot?", image=str(image), max_new_tokens=10)
    assert capsys.readouterr().out.strip()


def test_several_prompts_about_one_image(
    checkpoint: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("is it hot?\nPlease choose\n")
    generate(checkpoint, prompts=str(tmp_path / "prompts.txt"), image=str(image), template="none", max_new_tokens=6)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_language_model_is_shown_no_image(tiny_llama: Path, image: Path) -> None:
    with pytest.raises(ValueError, match="reads text alone: an image needs a LLaVA-style model"):
        generate(str(tiny_llama), prompt="is it hot?", image=str(image))


def test_an_image_that_is_not_there(checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"none\.png: no such image"):
        generate(checkpoint, prompt="is it hot?", image="none.png")
