"""The base of the datamodules with images: text is encoded once, images are opened and processed batch by batch."""

from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from datamodules.conversation import (
    ConversationTemplate,
    TokenizerTemplate,
    check_conversation_template,
    get_conversation_template,
    prompt_form,
)
from datamodules.encoding import Collator, EncodedSample, encode_samples
from datamodules.image_checks import report_skipped, sample_name, usable_samples
from datamodules.rows import OnBadRow
from datamodules.sharing import share_images
from datamodules.text import TextDataModule
from dora_lightning.data import IGNORE, Sample
from dora_lightning.images import IMAGE, open_image, pad_to_square
from dora_lightning.llava_parts import LlavaParts
from dora_lightning.processing import AspectRatio, image_token_counts, load_processor, mean_colour


class VisionDataModule(TextDataModule):
    """Turns samples with images into batches for a LLaVA-style model.

    A subclass implements :meth:`build_samples`: prompts with ``<image>`` where an image stands, and the images in the
    same order. Batches are those of :class:`~datamodules.text.TextDataModule` with each image's token repeated as often
    as the model takes positions for it (labels -100), and ``vision``, a dict of what the image processor returned for
    the images of the batch in their order (``pixel_values`` ``[images, 3, height, width]`` and what else the model
    wants); a batch of text alone has no ``vision``. A global batch has images in all samples or in none.

    Args:
        tokenizer: The model, a folder or hub id, or the parts it is put together from: its processor is read, tokenizer
            included.
        template: ``vicuna_v1``, ``llama3``, ``chatml``, or ``tokenizer`` for the tokenizer's own chat template.
        image_aspect_ratio: ``pad`` puts an image in the middle of a square in the mean colour, as LLaVA-1.5 does;
            ``plain`` leaves it to the image processor, as LLaVA-NeXT wants it.
        batch_size: As in :class:`~datamodules.text.TextDataModule`.
        eval_batch_size: Likewise.
        cutoff_len: Most tokens in a sample, those of its images included. What is longer is cut on the right; a
            sample whose images do not fit is a bad row.
        train_on_inputs: As in :class:`~datamodules.text.TextDataModule`; images are never trained on.
        num_workers: Processes that open and process images.
        seed: As in :class:`~datamodules.text.TextDataModule`.
        on_bad_row: ``raise`` stops at the first sample whose image is missing, too small, too large or no image, whose
            ``<image>`` are not as many as its images, or whose images do not fit; a file that is broken after its
            header stops the run when it is decoded. ``skip`` decodes every image at the start, leaves such samples out
            and reports how many.
        group_by_length: As in :class:`~datamodules.text.TextDataModule`; lengths count the tokens of images too.
        share_images: Training samples about the same image share a row, which reads the image once; each is answered
            as if it were alone. Needs the attention ``sdpa`` or ``eager``.
        exif_rotation: Turn photos upright as their EXIF data say, as phones show them; false leaves them as they are
            stored, as LLaVA's published code does.

    Raises:
        ValueError: ``template`` or ``image_aspect_ratio`` is unknown.
    """

    def __init__(
        self,
        tokenizer: str | LlavaParts,
        template: str = "vicuna_v1",
        image_aspect_ratio: AspectRatio = "pad",
        batch_size: int = 16,
        eval_batch_size: int = 16,
        cutoff_len: int = 2048,
        train_on_inputs: bool = False,
        num_workers: int = 4,
        seed: int = 42,
        on_bad_row: OnBadRow = "raise",
        group_by_length: bool = True,
        share_images: bool = False,
        exif_rotation: bool = True,
    ) -> None:
        super().__init__(
            tokenizer,
            batch_size,
            eval_batch_size,
            cutoff_len,
            train_on_inputs,
            num_workers,
            seed,
            on_bad_row,
            group_by_length,
        )
        self.share_images = share_images
        self.exif_rotation = exif_rotation
        check_conversation_template(template)
        if image_aspect_ratio not in ("pad", "plain"):
            raise ValueError(f"image_aspect_ratio must be 'pad' or 'plain', found {image_aspect_ratio!r}")
        self.template_name = template
        self.image_aspect_ratio = image_aspect_ratio
        self.template: ConversationTemplate | TokenizerTemplate | None = None
        """The conversation template, from :meth:`setup` on; :meth:`build_samples` makes its texts with it."""
        self.processor: Any = None
        """The model's processor, likewise."""

    def trained_inputs(self) -> dict[str, Any]:
        """See :mod:`dora_lightning.training.trained_inputs`."""
        images = {"image_aspect_ratio": self.image_aspect_ratio, "exif_rotation": self.exif_rotation}
        return images if self.template is None else images | {"prompt": prompt_form(self.template)}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer; the template is checked against it.

        Raises:
            ValueError: The model reads no images, its image token is none of the tokenizer's, or the template does
                not fit.
        """
        self.processor = load_processor(self.tokenizer_name)
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        if self.processor.image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"{self.tokenizer_name}: the tokenizer has no token {self.processor.image_token!r}, "
                "which the processor puts where an image stands"
            )
        self.template = get_conversation_template(self.template_name, tokenizer)
        return tokenizer

    def encode(self, samples: list[Sample]) -> list[EncodedSample]:
        """The tokens of samples whose images can be used; see ``on_bad_row``."""
        assert self.tokenizer is not None
        usable = usable_samples(samples, self.on_bad_row, self.exif_rotation)
        texts = [_with_image_token(sample, self.processor.image_token) for sample, _ in usable]
        encoded = encode_samples(texts, self.tokenizer, None, self.train_on_inputs)
        sizes = [size for _, sizes in usable for size in sizes]
        if self.image_aspect_ratio == "pad":
            sizes = [(max(size), max(size)) for size in sizes]
        counts = iter(image_token_counts(self.processor, sizes))
        good: list[EncodedSample] = []
        bad: list[str] = []
        for (sample, own_sizes), item in zip(usable, encoded, strict=True):
            try:
                image_tokens = tuple(next(counts) for _ in own_sizes)
                good.append(self._fitted(EncodedSample(sample, item.input_ids, item.labels, image_tokens)))
            except ValueError as error:
                message = f"{sample_name(sample)}: {error}"
                if self.on_bad_row == "raise":
                    raise ValueError(message) from error
                bad.append(message)
        report_skipped(bad, len(encoded), "since their images do not fit")
        return good

    def arranged(self, encoded: list[EncodedSample]) -> list[EncodedSample]:
        """Training samples, those about the same image joined if ``share_images``."""
        return share_images(encoded, self._image_token_id, self.cutoff_len) if self.share_images else encoded

    def collator(self) -> Collator:
        """What makes a batch of encoded samples, images included."""
        assert self.tokenizer is not None
        return VisionCollator(
            self.tokenizer.pad_token_id,
            self.cutoff_len,
            self._image_token_id,
            self.processor.image_processor,
            squares=self.image_aspect_ratio == "pad",
            exif_rotation=self.exif_rotation,
        )

    @property
    def _image_token_id(self) -> int:
        assert self.tokenizer is not None
        return self.tokenizer.convert_tokens_to_ids(self.processor.image_token)

    def _fitted(self, item: EncodedSample) -> EncodedSample:
        """Images are not trained on, and what is too long is cut, after the last image."""
        is_image = item.input_ids == self._image_token_id
        item.labels[is_image] = IGNORE
        if item.length <= self.cutoff_len:
            return item
        ends = _repeats(item, self._image_token_id).cumsum(0)
        needed = int(ends[is_image].max()) if item.image_tokens else 0
        if needed > self.cutoff_len:
            raise ValueError(
                f"its images and the text before the last of them take {needed} tokens, but cutoff_len is "
                f"{self.cutoff_len}"
            )
        kept = int((ends <= self.cutoff_len).sum())
        # cloned, or the whole would stay in memory
        cut = item.length - self.cutoff_len
        return item._replace(input_ids=item.input_ids[:kept].clone(), labels=item.labels[:kept].clone(), cut=cut)


class VisionCollator(Collator):
    """Makes a batch of encoded samples, opening and processing their images.

    Args:
        pad_token_id: As in :class:`~datamodules.encoding.Collator`.
        cutoff_len: Likewise.
        image_token_id: The token that stands for an image.
        image_processor: The model's own.
        squares: Pad images to squares first.
        exif_rotation: Turn them upright as their EXIF data say.
    """

    def __init__(
        self,
        pad_token_id: int,
        cutoff_len: int,
        image_token_id: int,
        image_processor: Any,
        squares: bool = True,
        exif_rotation: bool = True,
    ) -> None:
        super().__init__(pad_token_id, cutoff_len)
        self.image_token_id = image_token_id
        self.image_processor = image_processor
        self.squares = squares
        self.exif_rotation = exif_rotation
        self.background = mean_colour(image_processor)

    def __call__(self, encoded: list[EncodedSample]) -> dict[str, Any]:
        """Make the batch.

        Raises:
            ValueError: An image cannot be opened; the message names the sample and the image.
        """
        batch = super().__call__([self._expanded(item) for item in encoded])
        images = [image for item in encoded for image in self._images(item.sample)]
        if images:
            batch["vision"] = dict(self.image_processor(images=images, return_tensors="pt"))
        return batch

    def _expanded(self, item: EncodedSample) -> EncodedSample:
        repeats = _repeats(item, self.image_token_id)
        return item._replace(
            input_ids=item.input_ids.repeat_interleave(repeats),
            labels=item.labels.repeat_interleave(repeats),
            turns=None if item.turns is None else item.turns.repeat_interleave(repeats),
        )

    def _images(self, sample: Sample) -> list[Image.Image]:
        try:
            images = [open_image(source, self.exif_rotation) for source in sample.images]
        except ValueError as error:
            raise ValueError(f"{sample_name(sample)}: {error}") from error
        return [pad_to_square(image, self.background) for image in images] if self.squares else images


def _repeats(item: EncodedSample, image_token_id: int) -> torch.Tensor:
    """How many positions each token takes, ``[tokens]``."""
    repeats = torch.ones(len(item.input_ids), dtype=torch.int64)
    repeats[item.input_ids == image_token_id] = torch.tensor(item.image_tokens, dtype=torch.int64)
    return repeats


def _with_image_token(sample: Sample, token: str) -> Sample:
    """The sample with the model's own token for an image, where that is another than the placeholder."""
    if token == IMAGE:
        return sample
    prompt = sample.prompt

    def moved(position: int) -> int:
        return position + (len(token) - len(IMAGE)) * prompt.count(IMAGE, 0, position)

    answered = tuple((moved(start), moved(end)) for start, end in sample.answered)
    return sample._replace(prompt=prompt.replace(IMAGE, token), answered=answered)
