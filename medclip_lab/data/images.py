"""Images of a study on their way to the tower's pixels: finished by a loader process, or left to the tower's device.

On the device whole batches of JPEGs are decoded at once (nvJPEG through torchcodec), resized and augmented: for
machines whose cores cannot keep up with their GPU. What is no plain 8-bit JPEG is decoded by the loader process.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from medclip_lab.data.augment import AugmentConfig, augment, crop_box
from medclip_lab.data.decode import DecodeError, decode_image, jpeg_channels
from medclip_lab.data.preprocess import Box, Preprocess, stack
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import Study
from medclip_lab.errors import UserError

Encoded = tuple[str, bytes]
"""Suffix and bytes, as a shard holds an image."""


class Origin(NamedTuple):
    """Where an image comes from, for the list of what could not be used."""

    source: str
    shard: str
    key: str
    number: int


class Picture(NamedTuple):
    """One image of a batch: pixels of the tower's size; or, left to the device, pixels of any size or a JPEG."""

    content: Tensor | bytes
    seed: int
    origin: Origin


class Pending:
    """The images of a batch as a loader process leaves them to the device; stands where pixels will.

    No dataclass and no collection, whose content Lightning would move to the device: decoders want bytes here.
    """

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)


class Images:
    """Reads the images of studies.

    Args:
        training: any image of a study, cropped and changed at random; else the first, as it is.
        scaled: a large JPEG may be decoded smaller.
        on_device: leave to `finish` whatever a GPU does well.
    """

    def __init__(
        self, preprocess: Preprocess, changes: AugmentConfig, *, training: bool, scaled: bool, on_device: bool
    ) -> None:
        self.preprocess, self.changes = preprocess, changes
        self.training, self.scaled = training, scaled and training
        self.on_device = on_device and training
        if self.on_device:
            torchcodec_decoder()

    def views(self, study: Study, source: str, chance: random.Random, quarantine: Quarantine) -> list[Picture]:
        """One image of a study for each of `changes.views`; none if none can be decoded.

        The second is another image of the study, where it has one that can be decoded, else the same once more.
        """
        seeds = [chance.getrandbits(63)]
        order = chance.sample(study.images, len(study.images)) if self.training else list(study.images)
        if self.changes.views == 2:
            seeds.append(chance.getrandbits(63))
        elif not self.training:
            order = order[:1]
        origin = Origin(source, study.shard, study.key, study.number)
        pictures: list[Picture] = []
        used: Encoded | None = None
        for seed in seeds:
            while order:
                image = order.pop(0)
                try:
                    content = self._read(image, seed)
                except DecodeError as error:
                    quarantine.add(study.shard, study.key, "unreadable image", str(error), number=study.number)
                else:
                    used = image
                    break
            else:
                if used is None:
                    return []
                content = self._read(used, seed)
            pictures.append(Picture(content, seed, origin))
        return pictures

    def _read(self, image: Encoded, seed: int) -> Tensor | bytes:
        suffix, data = image
        if self.on_device:
            if jpeg_channels(data, suffix):
                return data
            pixels: Tensor = pil_to_tensor(self.preprocess.window(decode_image(data, suffix)))
            return pixels
        box = self._box(seed)
        at_least = self.preprocess.at_least(box) if self.scaled else None
        return self.preprocess(decode_image(data, suffix, at_least=at_least), box)

    def _box(self, seed: int) -> Box | None:
        return crop_box(self.changes, seed) if self.training else None

    def together(self, pictures: Sequence[Picture]) -> Tensor | Pending:
        """uint8 [B, C, H, W], augmented; or what `finish` makes that of."""
        if self.on_device:
            return Pending(pictures)
        pixels = stack([picture.content for picture in pictures if isinstance(picture.content, Tensor)])
        return augment(pixels, self.changes, [picture.seed for picture in pictures]) if self.training else pixels

    def finish(self, batch: dict[str, Any], device: torch.device, quarantines: dict[str, Quarantine]) -> dict[str, Any]:
        """A batch with uint8 pixels [B, C, H, W] on `device` in place of what a loader process left to it.

        A study whose image cannot be decoded is listed and leaves the batch, its text too.

        Raises:
            UserError: no study is left, or more are bad than the ceiling lets pass.
        """
        pending = {name: value for name, value in batch.items() if isinstance(value, Pending)}
        if not pending:
            return batch
        pixels: dict[str, dict[int, Tensor]] = {name: {} for name in pending}
        for name, images in pending.items():
            for number, found in enumerate(self._pixels(images, device)):
                if isinstance(found, Tensor):
                    pixels[name][number] = found
                else:
                    source, shard, key, sample = images.pictures[number].origin
                    quarantines[source].add(shard, key, "unreadable image", found, number=sample)
        rows = range(len(batch["image_id"]))
        kept = [number for number in rows if all(number in found for found in pixels.values())]
        if not kept:
            raise UserError(f"none of the {len(rows)} images of a batch can be decoded on {device}")
        if len(kept) < len(rows):
            batch = _only(kept, batch)
        for name, images in pending.items():
            seeds = [images.pictures[number].seed for number in kept]
            sized = [
                self.preprocess.resize(pixels[name][number], self._box(seed))
                for number, seed in zip(kept, seeds, strict=True)
            ]
            batch = batch | {name: augment(stack(sized), self.changes, seeds)}
        return batch

    def _pixels(self, pending: Pending, device: torch.device) -> list[Tensor | str]:
        """Pixels of every picture in its own size, or why it has none."""
        whole: list[Tensor | str] = [
            picture.content.to(device, non_blocking=True) if isinstance(picture.content, Tensor) else ""
            for picture in pending.pictures
        ]
        encoded: dict[int, list[tuple[int, bytes]]] = {1: [], 3: []}
        for number, picture in enumerate(pending.pictures):
            if isinstance(picture.content, bytes):
                encoded[jpeg_channels(picture.content, "jpg")].append((number, picture.content))
        for channels, jpegs in encoded.items():
            if jpegs:
                decoded = _decode([data for _, data in jpegs], channels, device)
                for (number, _), pixels in zip(jpegs, decoded, strict=True):
                    whole[number] = pixels
        return whole


def _only(kept: list[int], batch: dict[str, Any]) -> dict[str, Any]:
    """Some rows of a batch: of the images, and of the texts where they are the images' own."""
    names = ["image_id", "patient_id", "image_labels"]
    if batch["image_id"] == batch["text_id"]:
        names += ["text_id", "text", "second_text", "teacher_text", "text_labels"]
    chosen = {
        name: value[kept] if isinstance(value, Tensor) else [value[number] for number in kept]
        for name, value in batch.items()
        if name in names
    }
    return batch | chosen


def _decode(jpegs: list[bytes], channels: int, device: torch.device) -> list[Tensor | str]:
    """uint8 [C, H, W] of each on `device`, or why it has none."""
    decoder = torchcodec_decoder()
    mode = "GRAY" if channels == 1 else "RGB"
    try:
        return list(decoder(list(jpegs), mode=mode, device=device))
    except RuntimeError:
        pass  # one bad image fails its whole batch: each by itself, and by Pillow, which reads more kinds of JPEG
    results: list[Tensor | str] = []
    for data in jpegs:
        try:
            results.append(pil_to_tensor(decode_image(data, "jpg").image).to(device))
        except DecodeError as error:
            results.append(str(error))
    return results


def torchcodec_decoder() -> Any:
    """torchcodec's JPEG decoder.

    Raises:
        UserError: it is not installed.
    """
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, RuntimeError, OSError):
        raise UserError(
            "data.finish_on: the device decodes with torchcodec, which is not usable here: pip install "
            "'medclip_lab[decode]', or set it to 'loader'"
        ) from None
    return decode_jpeg
