"""Several questions about an image in one row, which reads the image once; none of them sees another."""

from collections.abc import Hashable, Sequence

import torch

from datamodules.encoding import EncodedSample
from dora_lightning.data import IGNORE
from dora_lightning.images import image_key


def share_images(encoded: Sequence[EncodedSample], image_token_id: int, cutoff_len: int) -> list[EncodedSample]:
    """Join samples about the same image: what their tokens begin with, image included, and then each one's rest.

    A joined sample's ``turns`` is 0 in what is shared, 1 in the first one's rest, 2 in the second one's, and so on. The
    model lets each rest see what is shared and itself alone, at the positions it would have by itself
    (:func:`dora_lightning.backbones.causal_lm.supervised_loss`), so the loss is that of the samples apart.

    Args:
        encoded: The samples; those without an image, and those that are alone with theirs, stay as they are.
        image_token_id: The token that stands for an image.
        cutoff_len: Most tokens in a row, those of images included.

    Returns:
        The rows, in the order of their first samples.
    """
    groups: dict[Any, list[EncodedSample]] = {}
    for number, item in enumerate(encoded):
        groups.setdefault(_images(item) or number, []).append(item)
    return [row for group in groups.values() for row in _rows(group, image_token_id, cutoff_len)]


def _images(item: EncodedSample) -> tuple[Hashable, ...]:
    return tuple(image_key(image) for image in item.sample.images)


def _rows(group: list[EncodedSample], image_token_id: int, cutoff_len: int) -> list[EncodedSample]:
    if len(group) == 1:
        return group
    shared = _shared(group)
    if image_token_id in group[0].input_ids[shared:]:
        return group  # what stands before the image differs, so the image is not read alike
    room = cutoff_len - (group[0].length - len(group[0].input_ids) + shared)
    rows: list[list[EncodedSample]] = [[]]
    used = 0
    for item in group:
        own = len(item.input_ids) - shared
        if rows[-1] and used + own > room:
            rows.append([])
            used = 0
        rows[-1].append(item)
        used += own
    return [_joined(row, shared) if len(row) > 1 else row[0] for row in rows]


def _shared(group: list[EncodedSample]) -> int:
    """How many tokens all begin with, none of which is trained; each keeps a token of its own."""
    length = min(len(item.input_ids) for item in group) - 1
    for item in group:
        differs = item.input_ids[:length] != group[0].input_ids[:length]
        differs |= item.labels[:length] != IGNORE
        if differs.any():
            length = int(differs.nonzero()[0])
    # what comes before a trained token must be the token that comes before it in the row
    return length - any(item.labels[length] != IGNORE for item in group)


def _joined(row: list[EncodedSample], shared: int) -> EncodedSample:
    rests = [item.input_ids[shared:] for item in row]
    labels = [item.labels[shared:] for item in row]
    turns = [torch.full((len(rest),), number, dtype=torch.int32) for number, rest in enumerate(rests, start=1)]
    return row[0]._replace(
        input_ids=torch.cat([row[0].input_ids[:shared], *rests]),
        labels=torch.cat([row[0].labels[:shared], *labels]),
        turns=torch.cat([torch.zeros(shared, dtype=torch.int32), *turns]),
    )
