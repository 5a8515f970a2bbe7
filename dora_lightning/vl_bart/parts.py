"""Put a VL-BART together from a BART, a visual embedding and, if features are computed on the fly, a vision tower.

The result is a Hugging Face folder in the cache: checkpoints, merging and whoever loads it know no difference to a
model that was published so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dora_lightning.messages import check_whole
from dora_lightning.model_cache import cache_folder, cached, digest, file_stamp, folder_stamps
from dora_lightning.open_clip_tower import OpenClipVision, build_tower
from dora_lightning.pretrained import checked_dtype, not_loaded, resolve_pretrained, resolve_recorded
from dora_lightning.vl_bart.model import VLBart, VLBartConfig

_EXTRA_TOKENS = 100  # that VL-T5 adds before those of object order
_SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


@dataclass
class VLBartParts:
    """What a VL-BART is put together from.

    Args:
        language: folder or hub id of a BART (``facebook/bart-base``); or the fields of a ``BartConfig`` (``d_model``,
            ``encoder_layers``, ...) for a new one, whose weights are random.
        tokenizer: of a new BART: folder or hub id of a tokenizer that begins texts with a token of its own and ends
            them with another, as BART's does; or the words that a new byte-level one is to know as single tokens.
        vision: the tower that features are computed with; null if they were computed before.
        feature_dim: features of a visual token, of a model without a tower.
        image_orders: most images of a sample that are told apart by their order.
        object_orders: most visual tokens of an image, or frames of a video, that are told apart.
        seed: seed of what is new.

    Raises:
        ValueError: an unknown field of a new BART or one that its tokenizer sets, or options that do not go together.
    """

    language: str | dict[str, Any]
    tokenizer: str | list[str] | None = None
    vision: OpenClipVision | None = None
    feature_dim: int | None = None
    image_orders: int = 2
    object_orders: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers, and what goes together."""
        check_whole(1, none="that of the tower", feature_dim=self.feature_dim)
        check_whole(1, image_orders=self.image_orders, object_orders=self.object_orders)
        check_whole(0, seed=self.seed)
        if isinstance(self.vision, dict):
            self.vision = OpenClipVision(**self.vision)
        if self.vision is not None and self.feature_dim is not None:
            raise ValueError("feature_dim is that of the tower (vision); remove one of the two")
        if isinstance(self.language, str):
            if self.tokenizer is not None:
                raise ValueError("tokenizer: a pretrained BART has its own; remove the option")
            return
        if self.tokenizer is None:
            raise ValueError("tokenizer: a new BART needs one, by name or as a list of words")
        tied_to_tokenizer = {"vocab_size", *(f"{kind}_id" for kind in _SPECIAL)}
        known = set(BartConfig().to_dict()) - set(PreTrainedConfig().to_dict()) - tied_to_tokenizer
        if unknown := sorted(self.language.keys() - known):
            raise ValueError(
                f"language: {unknown[0]!r} is no field of BartConfig to choose; there are {', '.join(sorted(known))}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, for checkpoints."""
        return asdict(self)


def resolve_vl_bart(name: str | VLBartParts, recorded_in: str | Path | None = None) -> str:
    """Folder of a VL-BART; parts are put together in the cache, once, and so is a plain BART.

    Args:
        name: of the whole model, or its parts.
        recorded_in: the file that says so, if it was not the user; nothing is fetched then, and weights of a vision
            tower are not read.

    Raises:
        FileNotFoundError: a part is not there.
        OSError: it could not be loaded.
        ValueError: it is no BART, or the parts do not fit together.
    """
    if isinstance(name, str):
        name = name if recorded_in is None else resolve_recorded(name, recorded_in)
        if _config(name).model_type == VLBartConfig.model_type:
            return resolve_pretrained(name)
        name = VLBartParts(name)
    key = digest(json.dumps(name.to_dict(), sort_keys=True), *_sources(name, recorded_in is None))
    label = Path(name.language).name if isinstance(name.language, str) else "new"
    folder = cache_folder() / "vl-bart" / f"{label}-{key}"
    parts = name if recorded_in is None or folder.is_dir() else _recorded(name, recorded_in)
    return str(cached(folder, lambda made: _assemble(parts, made, folder)))


def load_vl_bart(name: str | VLBartParts, dtype: str = "auto", attn_implementation: str | None = None) -> VLBart:
    """A VL-BART with its weights; errors as for :func:`resolve_vl_bart`.

    Args:
        name: folder or hub id of a VL-BART or of a BART, or parts.
        dtype: ``auto`` for the dtype the weights are stored in, or ``float32``, ``bfloat16``, ``float16``.
        attn_implementation: handed to ``transformers``.
    """
    return VLBart.from_pretrained(
        resolve_pretrained(resolve_vl_bart(name)), dtype=checked_dtype(dtype), attn_implementation=attn_implementation
    )


def load_vl_bart_tokenizer(name: str | VLBartParts) -> PreTrainedTokenizerBase:
    """The tokenizer of a VL-BART; errors as for :func:`resolve_vl_bart`."""
    source = resolve_vl_bart(name)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise not_loaded(source, "tokenizer", error) from error


def _config(name: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(resolve_pretrained(name), trust_remote_code=False)
    except OSError as error:
        raise not_loaded(name, "model", error) from error
    if config.model_type not in ("bart", VLBartConfig.model_type):
        raise ValueError(f"{name} is a {config.model_type} model; expected a BART or a VL-BART")
    return config


def _recorded(parts: VLBartParts, file: str | Path) -> VLBartParts:
    """Parts that a file names, each by its folder on this machine."""
    if parts.vision is not None and parts.vision.pretrained is not None:
        # a tag is downloaded, and a file may be a TorchScript archive, which is a program
        raise FileNotFoundError(
            f"{file}: the model that it belongs to is not in the cache of this machine, and weights of a vision tower "
            f"that a file names ({parts.vision.pretrained!r:.80}) are not read. Let a verb with the run's config put "
            "it together (dora-lightning test --config ...), or pass its folder, with --base"
        )
    language = resolve_recorded(parts.language, file) if isinstance(parts.language, str) else parts.language
    tokenizer = parts.tokenizer
    if isinstance(tokenizer, str) and not _is_tokenizer_folder(tokenizer):
        tokenizer = resolve_recorded(tokenizer, file)
    return replace(parts, language=language, tokenizer=tokenizer)


def _sources(parts: VLBartParts, fetch: bool) -> list[str]:
    """What the parts stand for now: a folder whose files were changed is another source."""
    sources: list[str] = []
    language = resolve_pretrained(parts.language, fetch) if isinstance(parts.language, str) else None
    tokenizer = _tokenizer_source(parts.tokenizer, fetch) if isinstance(parts.tokenizer, str) else None
    for name in (language, tokenizer):
        if name is not None and Path(name).is_dir():
            sources += folder_stamps(Path(name))
    weights = parts.vision.pretrained if parts.vision is not None else None
    if weights is not None and Path(weights).is_file():
        sources.append(file_stamp(Path(weights)))
    return sources


def _tokenizer_source(name: str, fetch: bool = True) -> str:
    return str(Path(name).expanduser()) if _is_tokenizer_folder(name) else resolve_pretrained(name, fetch)


def _is_tokenizer_folder(name: str) -> bool:
    # a tokenizer that was saved alone has no config.json
    return (Path(name).expanduser() / "tokenizer_config.json").is_file()


def _assemble(parts: VLBartParts, folder: Path, kept_as: Path) -> None:
    what = parts.language if isinstance(parts.language, str) else "a new BART"
    rank_zero_info(f"Making a VL-BART of {what} (once; kept in {kept_as})")
    # a run that finds the cache empty goes on with the same random numbers as one that does not
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parts.seed)
        bart, tokenizer = _bart(parts)
        _add_tokens(bart, tokenizer, parts.object_orders)
        tower = build_tower(parts.vision) if parts.vision is not None else None
        dimension = tower.feature_dim if tower is not None else (parts.feature_dim or 2048)
        of_bart = bart.config.to_dict()
        for own in ("model_type", "architectures"):
            of_bart.pop(own, None)
        config = VLBartConfig(
            **of_bart,
            feature_dim=dimension,
            image_orders=parts.image_orders,
            object_orders=parts.object_orders,
            vision=parts.vision.to_dict() if parts.vision is not None else None,
        )
        model = VLBart(config)
    model.load_state_dict(bart.state_dict(), strict=False)
    if tower is not None:
        assert model.vision_tower is not None
        model.vision_tower.load_state_dict(tower.state_dict())
    cast_model: nn.Module = model
    cast_model.to(bart.dtype)
    model.generation_config = bart.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bart(parts: VLBartParts) -> tuple[BartForConditionalGeneration, PreTrainedTokenizerBase]:
    if isinstance(parts.language, str):
        if _config(parts.language).model_type != "bart":
            raise ValueError(f"language: {parts.language} is a VL-BART already; give its name alone, without parts")
        source = resolve_pretrained(parts.language)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            return BartForConditionalGeneration.from_pretrained(source), tokenizer
        except OSError as error:
            raise not_loaded(parts.language, "model", error) from error
    assert parts.tokenizer is not None
    if isinstance(parts.tokenizer, str):
        try:
            tokenizer = AutoTokenizer.from_pretrained(_tokenizer_source(parts.tokenizer), trust_remote_code=False)
        except OSError as error:
            raise not_loaded(parts.tokenizer, "tokenizer", error) from error
    else:
        tokenizer = word_tokenizer(parts.tokenizer)
    ids = {f"{kind}_id": getattr(tokenizer, f"{kind}_id") for kind in ("bos_token", "eos_token", "pad_token")}
    if missing := [kind for kind, value in ids.items() if value is None]:
        raise ValueError(f"tokenizer: {parts.tokenizer} has no {missing[0].removesuffix('_id')}, as BART's has")
    begun, *_, ended = tokenizer("a")["input_ids"]
    if (begun, ended) != (ids["bos_token_id"], ids["eos_token_id"]):
        raise ValueError(
            f"tokenizer: {parts.tokenizer} does not begin a text with {tokenizer.bos_token} and end it with "
            f"{tokenizer.eos_token}, as BART's does"
        )
    config = BartConfig(
        vocab_size=len(tokenizer),
        **ids,
        decoder_start_token_id=ids["eos_token_id"],
        forced_eos_token_id=ids["eos_token_id"],
        **parts.language,
    )
    bart = BartForConditionalGeneration(config)
    # transformers 5.0 does not take it from the config
    bart.generation_config.forced_eos_token_id = ids["eos_token_id"]
    return bart, tokenizer


def _add_tokens(bart: BartForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, object_orders: int) -> None:
    """VL-T5's extra tokens, the last of which are those of object order, the first object's last."""
    names = [f"<extra_id_{number}>" for number in reversed(range(_EXTRA_TOKENS))]
    names += [f"<vis_extra_id_{number}>" for number in reversed(range(object_orders))]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    # a token of object order is found by its distance from the end
    vocabulary = len(tokenizer)
    old = bart.model.shared.num_embeddings
    bart.resize_token_embeddings(vocabulary, mean_resizing=False)
    if old > vocabulary - len(names):
        raise ValueError(
            f"the model has {old} embeddings for {vocabulary - len(names)} tokens: expected as many, as BART has"
        )


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, as BART's is, of which each word is one token; it spells what it does not know.

    A word is letters alone, or digits alone: others are parted there, as by BART's (``a0`` is two tokens).

    >>> tokenizer = word_tokenizer(["red", "circle"])
    >>> tokenizer.decode(tokenizer("red circle, round")["input_ids"])
    '<s>red circle, round</s>'
    >>> len(tokenizer("red circle")["input_ids"])
    4
    """
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([text for word in words for text in (word, f" {word}")], trainer)
    begin, end = core.token_to_id("<s>"), core.token_to_id("</s>")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **_SPECIAL)
