"""Put a LLaVA together from a language model, a vision tower and a projector.

The result is a Hugging Face folder in the cache, as the hub's LLaVA models are: everything else, from the processor to
the merged model, knows no difference.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

from dora_lightning.images import IMAGE
from dora_lightning.messages import check_whole
from dora_lightning.model_cache import cache_folder, cached, digest, file_stamp, folder_stamps
from dora_lightning.pretrained import (
    give_padding_token,
    load_causal_lm,
    not_loaded,
    resolve_pretrained,
    resolve_recorded,
)

_TOWERS = {"clip": CLIPVisionModel, "clip_vision_model": CLIPVisionModel}
_TOWERS_WITHOUT_CLASS_TOKEN = {"siglip": SiglipVisionModel, "siglip_vision_model": SiglipVisionModel}
# an embedding of a multiple of this many rows is what tensor cores want, and what the hub's LLaVA models have
_ROWS = 64


@dataclass
class LlavaParts:
    """What a LLaVA is put together from.

    Args:
        language: folder, hub id, GGUF file or ``package:NAME`` of a LLaMA-family language model.
        vision: folder or hub id of a CLIP or SigLIP model, whose vision tower is taken; or the fields of a
            ``CLIPVisionConfig`` (``image_size``, ``patch_size``, ``hidden_size``, ...) for a new tower.
        projector: file (``.safetensors``, or ``.bin`` as LLaVA publishes them) of a pretrained two-layer projector;
            null for a new one.
        feature_layer: hidden states of the tower that are projected, counted as in transformers; -2 as in LLaVA-1.5.
        class_token: whether the tower's class token is projected too; LLaVA leaves it out.
        seed: seed of what is new.

    Raises:
        ValueError: a field of a new tower is unknown.
    """

    language: str
    vision: str | dict[str, Any]
    projector: str | None = None
    feature_layer: int = -2
    class_token: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers, and the fields of a new tower."""
        check_whole(-999, most=999, feature_layer=self.feature_layer)
        check_whole(0, seed=self.seed)
        if isinstance(self.vision, dict):
            known = set(CLIPVisionConfig().to_dict()) - set(PreTrainedConfig().to_dict()) - {"projection_dim"}
            if unknown := sorted(self.vision.keys() - known):
                raise ValueError(
                    f"vision: {unknown[0]!r} is no field of CLIPVisionConfig; there are {', '.join(sorted(known))}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, for checkpoints."""
        return asdict(self)


def resolve_llava(name: str | LlavaParts, recorded_in: str | Path | None = None) -> str:
    """As :func:`~dora_lightning.pretrained.resolve_pretrained`; parts are put together in the cache, once.

    Args:
        name: of the whole model, or its parts.
        recorded_in: the file that says so, if it was not the user; nothing is fetched then.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: the parts do not fit together; the message says which.
    """
    fetch = recorded_in is None
    if isinstance(name, str):
        return resolve_pretrained(name) if recorded_in is None else resolve_recorded(name, recorded_in)
    sources = [
        _source(name.language, fetch),
        *(name.vision.items() if isinstance(name.vision, dict) else [name.vision]),
    ]
    if isinstance(name.vision, str):
        sources.append(_source(name.vision, fetch))
    if name.projector is not None:
        sources.append(file_stamp(_projector_file(name.projector)))
    key = digest(json.dumps(asdict(name), sort_keys=True), *sources)
    folder = cache_folder() / "llava" / f"{Path(name.language).name.replace(':', '-')}-{key}"
    if recorded_in is not None and not folder.is_dir():
        tower = resolve_recorded(name.vision, recorded_in) if isinstance(name.vision, str) else name.vision
        name = replace(name, language=resolve_recorded(name.language, recorded_in), vision=tower)
    parts = name
    return str(cached(folder, lambda made: _assemble(parts, made, folder)))


def _source(name: str, fetch: bool) -> str:
    """What a name stands for now: a folder whose files were changed is another source."""
    resolved = resolve_pretrained(name, fetch)
    return ";".join([resolved, *(folder_stamps(Path(resolved)) if Path(resolved).is_dir() else [])])


def _assemble(parts: LlavaParts, folder: Path, kept_as: Path) -> None:
    rank_zero_info(f"Putting {parts.language} and a vision tower together (once; kept in {kept_as})")
    # a run that finds the cache empty goes on with the same random numbers as one that does not
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parts.seed)
        language = load_causal_lm(parts.language)
        tokenizer = AutoTokenizer.from_pretrained(resolve_pretrained(parts.language), trust_remote_code=False)
        give_padding_token(tokenizer)
        _add_image_token(language, tokenizer)
        tower, image_processor = _tower(parts.vision)
        has_class_token = isinstance(tower, CLIPVisionModel)
        if not has_class_token and parts.class_token:
            raise ValueError(f"class_token: {type(tower).__name__} has none; remove the option")
        config = LlavaConfig(
            vision_config=tower.config,
            text_config=language.config,
            image_token_index=cast(int, tokenizer.convert_tokens_to_ids(IMAGE)),
            image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2 + parts.class_token,
            vision_feature_layer=parts.feature_layer,
            vision_feature_select_strategy="default" if has_class_token and not parts.class_token else "full",
            tie_word_embeddings=language.config.tie_word_embeddings,
        )
        model = _joined(config, language, tower)
    if parts.projector is not None:
        _load_projector(model.model.multi_modal_projector, parts.projector)
    cast(nn.Module, model).to(next(language.parameters()).dtype)
    model.generation_config = language.generation_config
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(has_class_token),
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
    ).save_pretrained(folder)


def _add_image_token(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    old = len(_embeddings(language)[0].weight)
    if len(tokenizer) <= old:
        return
    language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_ROWS, mean_resizing=False)
    embeddings = {id(layer.weight): layer.weight for layer in _embeddings(language)}
    for weight in embeddings.values():
        # of no influence on the input, where the image's features stand; in the output, as unlikely as the mean token
        weight.data[old:] = weight.data[:old].float().mean(dim=0)


def _embeddings(language: PreTrainedModel) -> list[Any]:
    return [layer for layer in (language.get_input_embeddings(), language.get_output_embeddings()) if layer is not None]


def _tower(vision: str | dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    if isinstance(vision, dict):
        config = CLIPVisionConfig(**vision)
        side = {"height": config.image_size, "width": config.image_size}
        # squares are scaled whole; what is none is cropped to one, as ever with CLIP
        processor = CLIPImageProcessor(size={"shortest_edge": config.image_size}, crop_size=side)
        return CLIPVisionModel(config), processor
    source = resolve_pretrained(vision)
    try:
        kind = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
        towers = _TOWERS | _TOWERS_WITHOUT_CLASS_TOKEN
        if kind not in towers:
            raise ValueError(f"vision: {vision} is a {kind} model; expected one of {', '.join(towers)}")
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        return towers[kind].from_pretrained(source), processor
    except OSError as error:
        raise not_loaded(vision, "vision tower", error) from error


def _joined(config: LlavaConfig, language: PreTrainedModel, tower: PreTrainedModel) -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    model.model.vision_tower = tower
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return model


def _projector_file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no projector file at {path}: expected a .safetensors or .bin file")
    return path


def _load_projector(projector: nn.Module, name: str) -> None:
    path = _projector_file(name)
    tensors: dict[str, Tensor]
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything for a file it cannot read
        raise ValueError(f"projector: {path} could not be read as weights: {error}") from error
    # LLaVA's own files number the layers of a Sequential; 1 is the activation
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        layer = layer.rpartition(".")[2]
        renamed[f"{ {'0': 'linear_1', '2': 'linear_2'}.get(layer, layer) }.{kind}"] = tensor
    expected = {key: tuple(tensor.shape) for key, tensor in projector.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in renamed.items()}
    if found != expected:
        raise ValueError(f"projector: {path} holds {found}, but this tower and language model need {expected}")
    projector.load_state_dict(renamed)
