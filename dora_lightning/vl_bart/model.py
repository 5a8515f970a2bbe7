"""BART whose encoder reads text and visual features together (VL-BART of VL-T5, as VL-Adapter and DoRA train it).

Shapes: B samples, T text tokens, V visual tokens, C features of a visual token, D hidden features, N images of all
samples, L target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartEncoder

from dora_lightning.open_clip_tower import OpenClipTower, OpenClipVision, build_tower

_OF_FEATURES = ("features", "image_order", "object_order", "visual_mask")  # that were computed before
_OF_PIXELS = ("pixel_values", "image_counts")
VISION_INPUTS = (*_OF_FEATURES, "boxes", *_OF_PIXELS, "visual_index")


class VLBartConfig(BartConfig):
    """BART's config, and what its visual tokens are.

    Args:
        feature_dim: features of a visual token, C.
        image_orders: most images of a sample that are told apart by their order.
        object_orders: most visual tokens of an image, or frames of a video, that are; they take the place of the last
            so many tokens of the vocabulary, the last one being the first.
        vision: fields of :class:`~dora_lightning.open_clip_tower.OpenClipVision` of the tower that features come from;
            null if the model reads features that were computed before.
    """

    model_type = "vl_bart"

    def __init__(
        self,
        feature_dim: int = 2048,
        image_orders: int = 2,
        object_orders: int = 100,
        vision: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.feature_dim = feature_dim
        self.image_orders = image_orders
        self.object_orders = object_orders
        self.vision = vision
        super().__init__(**kwargs)


class VisualEmbedding(nn.Module):
    """Visual features ``[B, V, C]`` as tokens ``[B, V, D]``: the sum of what a feature is, where and which it is.

    ``LN(Linear(feature)) + LN(Linear(x1, y1, x2, y2, area)) + image order + object order``.
    """

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__()
        width: Any = config.d_model
        self.feature = nn.Linear(config.feature_dim, width)
        self.feature_norm = nn.LayerNorm(width)
        self.box = nn.Linear(5, width)
        self.box_norm = nn.LayerNorm(width)
        self.image_order = nn.Embedding(config.image_orders, width)
        self.object_orders = config.object_orders

    def forward(
        self, features: Tensor, boxes: Tensor | None, image_order: Tensor, object_order: Tensor, tokens: Tensor
    ) -> Tensor:
        """The tokens.

        Args:
            features: ``[B, V, C]``.
            boxes: ``[B, V, 4]``, corners ``x1, y1, x2, y2`` as parts of the image's width and height; None for zeros,
                as with features of a grid.
            image_order: ``[B, V]``, which of a sample's images.
            object_order: ``[B, V]``, which token of its image, or frame of a video.
            tokens: ``[vocabulary, D]``, the embedding of the text's tokens; the last ones are those of object order.

        Raises:
            ValueError: another number of features, or more images or tokens of one than the model tells apart.
        """
        if features.shape[-1] != self.feature.in_features:
            raise ValueError(
                f"visual features have {features.shape[-1]} numbers, and this model reads {self.feature.in_features} "
                "(feature_dim)"
            )
        self.check_orders(image_order, object_order)
        if boxes is None:
            boxes = features.new_zeros(*features.shape[:-1], 4)
        width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
        boxes = torch.cat([boxes, (width * height).unsqueeze(-1)], dim=-1)
        dtype = self.feature.weight.dtype
        return (
            self.feature_norm(self.feature(features.to(dtype)))
            + self.box_norm(self.box(boxes.to(dtype)))
            + self.image_order(image_order)
            # of these tokens alone, so that an order past the last of them is an error on a GPU too
            + F.embedding(object_order, tokens[-self.object_orders :].flip(0))
        )

    def check_orders(self, image_order: Tensor, object_order: Tensor) -> None:
        """See whether orders are known, where a look at them costs nothing: a GPU's would be waited for.

        Raises:
            ValueError: more images or tokens of one than the model tells apart.
        """
        known = {"image": self.image_order.num_embeddings, "object": self.object_orders}
        for what, order in (("image", image_order), ("object", object_order)):
            if order.numel() and order.device.type == "cpu" and int(order.max()) >= known[what]:
                raise ValueError(
                    f"{what} order {int(order.max())}: this model tells {known[what]} apart ({what}_orders), "
                    "counted from 0"
                )


class VisualTokens(NamedTuple):
    """What :class:`VisualEmbedding` reads, and which of it is there."""

    features: Tensor
    image_order: Tensor
    object_order: Tensor
    mask: Tensor


class VLBart(BartForConditionalGeneration):
    """BART with a visual embedding, and a vision tower if its config has one.

    Called as BART is, with visual inputs beside the text: features that were computed before, or pixels. Without them
    it is BART. ``generate`` takes what :meth:`encode` returns, as ``encoder_outputs`` and ``attention_mask``.
    """

    config_class = VLBartConfig
    config: VLBartConfig
    vision_tower: OpenClipTower | None

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config)
        self.vision_tower = None
        if config.vision is not None:
            self.vision_tower = build_tower(OpenClipVision(**config.vision), weights=False)
            for module in self.vision_tower.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # it starts as open_clip starts it
        self.post_init()

    def train(self, mode: bool = True) -> VLBart:
        """As ever; a tower that does not train stays in evaluation mode, where its statistics stay what they are."""
        super().train(mode)
        if self.vision_tower is not None and not any(p.requires_grad for p in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def encode(self, input_ids: Tensor, attention_mask: Tensor, **vision: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the decoder attends to, ``[B, T + V, D]``, and which of it is there, ``[B, T + V]``.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 0 on padding.
            vision: ``features [B, V, C]`` with ``image_order``, ``object_order``, ``visual_mask`` and, if there are
                any, ``boxes``; or ``pixel_values [N, 3, height, width]`` with ``image_counts [B]``. Nothing for text.
                With ``visual_index [B]`` these are of fewer things to look at, and it says which of them each sample
                looks at.

        Raises:
            ValueError: inputs that are none of these, or not as many images as counted.
        """
        given = {name: tensor for name, tensor in vision.items() if tensor is not None}
        if unknown := given.keys() - set(VISION_INPUTS):
            raise ValueError(f"unknown visual input {min(unknown)!r}; there are {', '.join(VISION_INPUTS)}")
        encoder = self.model.encoder
        visual = None
        if given:
            tokens = self._visual_tokens(given)
            weight = cast(Tensor, encoder.embed_tokens.weight)
            visual = self.visual_embedding(
                tokens.features, given.get("boxes"), tokens.image_order, tokens.object_order, weight
            )
            seen = tokens.mask.to(attention_mask)
            if (index := given.get("visual_index")) is not None:
                visual, seen = visual[index], seen[index]
            attention_mask = torch.cat([attention_mask, seen], dim=1)
        return joint_encode(encoder, input_ids, visual, attention_mask), attention_mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        **options: Any,
    ) -> Any:
        """As BART's, with the visual inputs of :meth:`encode`; ``attention_mask [B, T]`` is that of the text."""
        vision = {name: options.pop(name) for name in VISION_INPUTS if name in options}
        if encoder_outputs is None and any(value is not None for value in vision.values()):
            assert input_ids is not None
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            hidden, attention_mask = self.encode(input_ids, mask, **vision)
            encoder_outputs, input_ids = BaseModelOutput(last_hidden_state=hidden), None
        return super().forward(input_ids, attention_mask, encoder_outputs=encoder_outputs, **options)

    def _visual_tokens(self, given: dict[str, Tensor]) -> VisualTokens:
        named, optional = (_OF_PIXELS, set()) if "pixel_values" in given else (_OF_FEATURES, {"boxes"})
        if given.keys() - optional - {"visual_index"} != set(named):
            raise ValueError(
                f"expected visual inputs {', '.join(_OF_FEATURES)} and perhaps boxes, or {' and '.join(_OF_PIXELS)}; "
                f"found {', '.join(given)}"
            )
        inputs = [given[name] for name in named]
        return self._from_pixels(*inputs) if "pixel_values" in given else VisualTokens(*inputs)

    def _from_pixels(self, pixel_values: Tensor, image_counts: Tensor) -> VisualTokens:
        """The tower's features of each sample's images, in their order, padded to the longest."""
        if self.vision_tower is None:
            raise ValueError("this model has no vision tower: give it features, or a tower (vision) when it is made")
        counts = image_counts.tolist()
        if sum(counts) != len(pixel_values):
            raise ValueError(f"image_counts says {sum(counts)} images, and pixel_values holds {len(pixel_values)}")
        per_image = self.vision_tower(pixel_values)  # [N, rows, C]
        image_order, object_order = visual_orders(counts, per_image.shape[1])
        features = nn.utils.rnn.pad_sequence([rows.flatten(0, 1) for rows in per_image.split(counts)], batch_first=True)
        self.visual_embedding.check_orders(image_order, object_order)
        device = pixel_values.device
        mask = image_order >= 0
        return VisualTokens(features, image_order.clamp(min=0).to(device), object_order.to(device), mask.to(device))


def joint_encode(encoder: BartEncoder, input_ids: Tensor, visual: Tensor | None, attention_mask: Tensor) -> Tensor:
    """BART's encoder over text and visual tokens: hidden states ``[B, T + V, D]``.

    Visual tokens come after the text's, behind its embedding's layer norm, and have none of its positions.

    Args:
        encoder: BART's.
        input_ids: ``[B, T]``.
        visual: ``[B, V, D]``, None for text alone.
        attention_mask: ``[B, T + V]``, 0 on padding.
    """
    embeds = encoder.embed_tokens(input_ids)
    hidden = encoder.layernorm_embedding(embeds + encoder.embed_positions(input_ids))
    if visual is not None:
        hidden = torch.cat([hidden, visual.to(hidden.dtype)], dim=1)
    dropout, layerdrop = cast(float, encoder.dropout), cast(float, encoder.layerdrop)
    hidden = F.dropout(hidden, p=dropout, training=encoder.training)
    # positional, since transformers renamed a keyword
    mask = create_bidirectional_mask(encoder.config, hidden, attention_mask)
    for layer in encoder.layers:
        if encoder.training and layerdrop > 0 and torch.rand([]) < layerdrop:
            continue
        output = layer(hidden, mask)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def visual_orders(counts: Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
    """Image and object order ``[B, V]`` of samples with so many images of so many rows; -1 and 0 on padding.

    A grid's rows are the objects of their image. Where an image is one row, as a frame of a video is, images are the
    objects of one.

    >>> visual_orders([2, 1], rows=2)
    (tensor([[ 0,  0,  1,  1],
            [ 0,  0, -1, -1]]), tensor([[0, 1, 0, 1],
            [0, 1, 0, 0]]))
    >>> visual_orders([3], rows=1)
    (tensor([[0, 0, 0]]), tensor([[0, 1, 2]]))
    """
    index = torch.arange(max(counts, default=0) * rows)
    there = index < torch.tensor(counts)[:, None] * rows  # [B, V]
    image, row = (index // rows, index % rows) if rows > 1 else (torch.zeros_like(index), index)
    return torch.where(there, image, -1), torch.where(there, row, 0)


AutoConfig.register(VLBartConfig.model_type, VLBartConfig)
AutoModelForSeq2SeqLM.register(VLBartConfig, VLBart)
