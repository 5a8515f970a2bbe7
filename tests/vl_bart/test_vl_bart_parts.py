"""A VL-BART put together from parts: its tokenizer, what is random in it, and the folder it is kept in."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vl_bart import BART, TOWER, save_bart
from torch import Tensor
from transformers import AutoTokenizer, BartForConditionalGeneration

from dora_lightning.open_clip_tower import OpenClipVision
from dora_lightning.vl_bart import VLBartParts, load_vl_bart, load_vl_bart_tokenizer, resolve_vl_bart
from dora_lightning.vl_bart.parts import word_tokenizer

WORDS = ["red", "circle", "circles", "is", "it"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bart(tmp_path: Path) -> Path:
    return save_bart(tmp_path / "bart")


def new(**options: Any) -> VLBartParts:
    return VLBartParts(**({"language": BART, "tokenizer": WORDS, "feature_dim": 8} | options))


def weights(parts: VLBartParts | str) -> dict[str, Tensor]:
    return load_vl_bart(parts).state_dict()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("red circle", ["red", "Ġcircle"]),
        ("circles", ["circles"]),  # begun by another word
        (" red", ["Ġred"]),
        ("Red", ["R", "ed"]),
        ("circlesred", ["circles", "red"]),
        ("red-circle?", ["red", "-", "circle", "?"]),
        ("is  it", ["is", "Ġ", "Ġit"]),
        ("a0 12", ["a", "0", "Ġ", "1", "2"]),
        ("", []),
        ("ü", ["Ã", "¼"]),
    ],
)
def test_words_are_tokens_and_what_is_unknown_is_spelt(text: str, tokens: list[str]) -> None:
    tokenizer = word_tokenizer(WORDS)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *tokens, "</s>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_text_can_be_spelt() -> None:
    tokenizer = word_tokenizer(WORDS)
    text = "".join(map(chr, [*range(32, 0x250), 0x4E2D, 0x1F600])) + "\n\t"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_list_of_words() -> None:
    plain = word_tokenizer(WORDS)
    # special tokens, the 256 bytes, and of each word what it was merged from
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    assert plain.convert_ids_to_tokens(list(range(5))) == list(special)
    assert (plain.bos_token, plain.pad_token, plain.eos_token, plain.unk_token, plain.mask_token) == special
    assert len(word_tokenizer([])) == 5 + 256
    again = word_tokenizer([*WORDS, "red", "red"])
    for text in ("red", " red", "circles"):
        assert len(again(text)["input_ids"]) == 3
    many = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "klmnp"]
    tokenizer = word_tokenizer(many)
    assert all(len(tokenizer(text)["input_ids"]) == 3 for word in many for text in (word, f" {word}"))
    # batches are padded on the right, as the encoder's positions need
    padded = plain(["red", "red circle"], padding=True)
    assert padded["input_ids"][0][-1] == plain.pad_token_id
    assert padded["attention_mask"][0] == [1, 1, 1, 0]


def test_the_same_words_are_the_same_tokens_in_any_process() -> None:
    code = "from dora_lightning.vl_bart.parts import word_tokenizer as w; print(sorted(w(%r).get_vocab().items()))"
    words = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "klmnp"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.check_output(
        [sys.executable, "-c", code % words], env=environment, text=True, stderr=subprocess.DEVNULL
    )
    assert found.strip() == str(sorted(word_tokenizer(words).get_vocab().items()))


def test_a_new_bart_has_what_its_fields_say() -> None:
    parts = new(language=BART | {"d_model": 16}, image_orders=3, object_orders=7)
    model, tokenizer = load_vl_bart(parts), load_vl_bart_tokenizer(parts)
    config: Any = model.config
    assert model.model.shared.weight.shape == (len(tokenizer), 16)
    assert len(tokenizer) == len(word_tokenizer(WORDS)) + 100 + 7
    assert model.final_logits_bias.shape == (1, len(tokenizer))
    assert model.lm_head.weight is model.model.shared.weight
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == special
    generation: Any = model.generation_config
    assert config.decoder_start_token_id == tokenizer.eos_token_id
    assert generation.decoder_start_token_id == generation.forced_eos_token_id == tokenizer.eos_token_id
    assert (config.feature_dim, config.image_orders, config.object_orders) == (8, 3, 7)
    assert model.visual_embedding.image_order.weight.shape == (3, 16)
    assert load_vl_bart(new(feature_dim=None)).config.feature_dim == 2048  # CLIP's RN101


def test_what_is_given_stays_and_what_is_new_comes_from_the_seed(
    bart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = OpenClipVision(config=TOWER)
    one, other = (weights(VLBartParts(str(bart), vision=tower, seed=seed)) for seed in (1, 2))
    given = BartForConditionalGeneration.from_pretrained(bart).state_dict()
    for name, tensor in given.items():
        for found in (one, other):
            own = found[name][tuple(map(slice, tensor.shape))]  # without the tokens that were added
            torch.testing.assert_close(own, tensor, rtol=0, atol=0)
    drawn = [name for name in one if name.startswith("visual_embedding") and name.endswith("weight")]
    for name in (*drawn, "model.shared.weight"):
        assert torch.equal(one[name], other[name]) == ("norm" in name), name
    # the tower's are of the tower's own seed
    towers = [name for name in one if name.startswith("vision_tower")]
    assert towers
    assert all(torch.equal(one[name], other[name]) for name in towers)
    # and of nothing else: neither of the numbers drawn before nor of the cache
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "other"))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = weights(VLBartParts(str(bart), vision=tower, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert again.keys() == one.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in one.items())
    assert not torch.equal(weights(new(seed=1))["model.shared.weight"], weights(new(seed=2))["model.shared.weight"])


def test_a_tokenizer_by_folder(bart: Path, tmp_path: Path) -> None:
    words = word_tokenizer(["triangle"])
    words.save_pretrained(tmp_path / "alone")  # without a config.json
    for folder in (tmp_path / "alone", bart):
        parts = new(tokenizer=str(folder))
        expected: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer = load_vl_bart_tokenizer(parts)
        assert tokenizer("what color is a triangle")["input_ids"] == expected("what color is a triangle")["input_ids"]
        assert load_vl_bart(parts).config.vocab_size == len(expected) + 200
    with pytest.raises(FileNotFoundError, match="none: expected a folder"):
        resolve_vl_bart(new(tokenizer=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("template", "message"),
    [("$A </s>", "does not begin a text with <s> and end it with </s>"), ("<s> $A", "does not begin a text with")],
)
def test_a_tokenizer_that_does_not_mark_where_texts_begin_and_end(tmp_path: Path, template: str, message: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(WORDS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=f"tokenizer: {tmp_path / 'tokenizer'} {message}"):
        resolve_vl_bart(new(tokenizer=str(tmp_path / "tokenizer")))


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer has no pad_token, as BART's has"):
        resolve_vl_bart(new(tokenizer=str(tmp_path / "tokenizer")))


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_folder_is_another_source(bart: Path, changed: str) -> None:
    parts = VLBartParts(str(bart), feature_dim=8)
    folder = resolve_vl_bart(parts)
    (bart / "README.md").write_text("nothing that is read")
    assert resolve_vl_bart(parts) == folder
    stat = (bart / changed).stat()
    os.utime(bart / changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert resolve_vl_bart(parts) != folder
    # whatever it is the source of
    words = new(tokenizer=str(bart))
    folder = resolve_vl_bart(words)
    os.utime(bart / changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 2 * 10**9))
    assert resolve_vl_bart(words) != folder


def test_changed_weights_of_a_tower_are_another_source(bart: Path, tmp_path: Path) -> None:
    from dora_lightning.open_clip_tower import build_tower

    path = tmp_path / "tower.pt"

    def save(seed: int) -> None:
        tower = build_tower(OpenClipVision(config=TOWER, seed=seed))
        torch.save({f"visual.{name}": tensor for name, tensor in tower.visual.state_dict().items()}, path)

    save(1)
    parts = VLBartParts(str(bart), vision=OpenClipVision(config=TOWER, pretrained=str(path)))
    one = weights(parts)
    save(2)
    other = weights(parts)
    names = [name for name in one if name.startswith("vision_tower") and "conv1" in name]
    assert names
    assert not any(torch.equal(one[name], other[name]) for name in names)


def test_a_padded_table_of_embeddings_is_refused(bart: Path, tmp_path: Path) -> None:
    model = BartForConditionalGeneration.from_pretrained(bart)
    tokenizer = AutoTokenizer.from_pretrained(bart)
    model.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    # tokens of object order would lie elsewhere than at the end
    with pytest.raises(ValueError, match=rf"the model has {len(tokenizer) + 3} embeddings for {len(tokenizer)} tokens"):
        resolve_vl_bart(str(tmp_path / "padded"))
    assert not list((tmp_path / "cache" / "vl-bart").iterdir())


def test_a_vl_bart_is_no_part(bart: Path) -> None:
    folder = resolve_vl_bart(VLBartParts(str(bart), feature_dim=8))
    with pytest.raises(ValueError, match="is a VL-BART already; give its name alone"):
        resolve_vl_bart(VLBartParts(folder, feature_dim=9))


KILLED = """
import os, signal, sys
from dora_lightning.vl_bart import VLBart, VLBartParts, resolve_vl_bart
save = VLBart.save_pretrained
def killed(self, folder, **options):
    save(self, folder, **options)
    os.kill(os.getpid(), signal.SIGKILL)
VLBart.save_pretrained = killed
resolve_vl_bart(VLBartParts(sys.argv[1], feature_dim=8))
"""


def test_a_killed_process_leaves_no_model(bart: Path, cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(bart)], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not list((cache / "vl-bart").glob("bart-*"))
    assert [path.name for path in (cache / "vl-bart").rglob("model.safetensors")]  # it was that far
    folder = Path(resolve_vl_bart(VLBartParts(str(bart), feature_dim=8)))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
