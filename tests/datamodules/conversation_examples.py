"""Tiny tokenizers of the two kinds that conversations are tokenised by, and processors for 32x32 pixels."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlamaTokenizer,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "What is in the picture? It is a red square. How many are there? There are two of them, and both are blue.",
    "Is it a circle? Yes. No. system user assistant You are a helpful assistant.",
]
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_bpe(bos: str | None = "<s>", eos: str = "</s>", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as LLaMA-3 has one, that begins every text with ``bos`` if there is one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<image>", *SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    steps = [processors.ByteLevel(trim_offsets=True)]
    if bos is not None:
        ids = [(bos, tokenizer.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens=["<image>"],
        chat_template=chat_template,
    )


def make_sentencepiece(folder: Path) -> Path:
    """A SentencePiece model like LLaMA's: BPE with byte fallback and a space before every text."""
    (folder / "texts").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def make_llama_tokenizer(folder: Path, legacy: bool = True) -> PreTrainedTokenizerBase:
    """LLaMA's fast tokenizer of that model; a legacy one, as Vicuna's, puts a space after each special token too."""
    make_sentencepiece(folder)
    tokenizer = LlamaTokenizer.from_pretrained(
        folder, legacy=legacy, pad_token="<unk>", extra_special_tokens=["<image>", *SPECIAL], add_bos_token=True
    )
    assert tokenizer.is_fast
    return tokenizer


def make_slow_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A slow tokenizer of that model, which knows nothing of characters."""
    tokenizer = SentencePieceBackend(
        vocab_file=str(make_sentencepiece(folder)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens=["<image>", *SPECIAL],
        special_tokens_pattern="bos",
    )
    assert not tokenizer.is_fast
    return tokenizer


def save_llava_processor(
    folder: Path, tokenizer: PreTrainedTokenizerBase, next: bool = False, image_token: str = "<image>"
) -> str:
    """A processor for images of 32x32 pixels in patches of 8: 16 tokens each; for LLaVA-NeXT, tiles of that size."""
    mean = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5]}
    size: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    options = {
        "image_token": image_token,
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if next:
        grid = [[32, 64], [64, 32], [64, 64]]
        images = LlavaNextImageProcessorPil(**size, **mean, image_grid_pinpoints=grid)
        LlavaNextProcessor(images, tokenizer, **options).save_pretrained(folder)
    else:
        LlavaProcessor(CLIPImageProcessorPil(**size, **mean), tokenizer, **options).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_next" if next else "llava"}))
    return str(folder)
