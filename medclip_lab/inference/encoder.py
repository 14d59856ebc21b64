"""A bundle, loaded: images and texts to embeddings, prompts to classifiers."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image

from medclip_lab.data.decode import DecodeError, read_image
from medclip_lab.data.preprocess import Preprocess, PreprocessConfig, stack
from medclip_lab.errors import UserError
from medclip_lab.files import read_json
from medclip_lab.inference.bundle import PREPROCESS, open_bundle
from medclip_lab.inference.calibration import Calibration
from medclip_lab.inference.classifier import ScoreType, ZeroShotClassifier
from medclip_lab.inference.labelset import LabelSet, load_labelset
from medclip_lab.inference.prompts import encode_prompts
from medclip_lab.models.dual_encoder import DualEncoder
from medclip_lab.models.spec import load_folder, quiet

T = TypeVar("T")


def load(bundle: str | os.PathLike[str], device: str = "auto") -> "Encoder":
    """Open an exported bundle, offline, after checking every file against the manifest.

    Args:
        device: "auto" takes a CUDA device if there is one.

    Raises:
        UserError: no bundle, or one whose files were changed after export.
    """
    folder, manifest = open_bundle(os.fspath(bundle))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    preprocess = PreprocessConfig.from_record(read_json(folder / PREPROCESS, "bundle"))
    model = DualEncoder(load_folder(folder)[0], preprocess)
    with quiet():
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    return Encoder(folder, manifest, model.to(device).eval(), tokenizer, preprocess)


class Encoder:
    """Both towers of a bundle. `load` makes one."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], model: DualEncoder, tokenizer: Any, preprocess: PreprocessConfig
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.model = model
        self.tokenizer = tokenizer
        self.preprocess = Preprocess(preprocess)

    @property
    def fingerprint(self) -> str:
        """Identity of weights, preprocessing and tokenizer: embeddings of another fingerprint do not compare."""
        return str(self.manifest["fingerprint"])

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach())

    @property
    def logit_bias(self) -> float | None:
        bias = self.model.logit_bias
        return None if bias is None else float(bias.detach())

    @torch.inference_mode()
    def encode_images(self, images: Iterable[str | Path | Image.Image], batch_size: int = 64) -> NDArray[np.float32]:
        """Embeddings of image files or Pillow images.

        Returns:
            float32 [N, D], unit norm.

        Raises:
            UserError: a file is missing or cannot be decoded.
        """
        device = self.model.mean.device
        rows = [
            self.model.encode_image(stack([self._pixels(image) for image in chunk]).to(device)).cpu().numpy()
            for chunk in _chunks(_refuse_single(images), batch_size)
        ]
        return np.concatenate(rows) if rows else self._nothing()

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> NDArray[np.float32]:
        """Embeddings of texts; longer ones than the context are cut, the end token kept.

        Returns:
            float32 [N, D], unit norm.
        """
        device = self.model.mean.device
        rows = [
            self.model.encode_text(self.tokenizer(chunk).to(device)).cpu().numpy()
            for chunk in _chunks(_refuse_single(texts), batch_size)
        ]
        return np.concatenate(rows) if rows else self._nothing()

    def encode_prompts(self, texts: Sequence[str], truncate: bool = False) -> NDArray[np.float32]:
        """Embeddings of many short texts, sorted by length so that little padding is computed.

        Args:
            truncate: cut texts that are longer than the context, the end token kept.

        Returns:
            float32 [N, D], unit norm.

        Raises:
            PromptTooLongError: a text is longer than the context.
        """
        return encode_prompts(self.model.model, self.tokenizer, texts, self.model.mean.device, truncate)

    def zero_shot_classifier(
        self,
        labelset: str | Path | LabelSet = "chexpert14",
        score_type: ScoreType | None = None,
        *,
        temperature: float | None = None,
        batch_zscore: bool = False,
        truncate: bool = False,
        calibrated: bool = True,
    ) -> ZeroShotClassifier:
        """A classifier for a label set: the bundle's own prompts if it was exported with it, else encoded now.

        Args:
            labelset: name of a shipped set, a YAML file, or a LabelSet.
            score_type, temperature, batch_zscore: the rule of scoring, see `ZeroShotClassifier`; None takes the one
                that fits the model.
            truncate: cut prompts that are longer than the context instead of refusing them.
            calibrated: give probabilities and decisions where the bundle has a calibration for this set and rule.

        Raises:
            UserError: no such set, a prompt too long, or a rule that does not fit.
        """
        wanted = labelset if isinstance(labelset, LabelSet) else self.labelset(labelset)
        classifier = self._stored(wanted) or ZeroShotClassifier.from_prompts(
            wanted, lambda texts: self.encode_prompts(texts, truncate), self.logit_scale, self.logit_bias
        )
        classifier = classifier.with_rule(score_type, temperature=temperature, batch_zscore=batch_zscore)
        calibration = Calibration.load(self.folder, wanted.name) if calibrated else None
        # A bundle's weights, opened as another's model, may see images that are prepared otherwise.
        ours = calibration is not None and calibration.facts["bundle"] == self.fingerprint
        if calibration is not None and ours and calibration.fits(classifier.rule, wanted.hash):
            classifier.calibration = calibration
        return classifier.with_encoder(self)

    def _stored(self, labelset: LabelSet) -> ZeroShotClassifier | None:
        path = self.folder / "classifiers" / f"{labelset.name}.safetensors"
        if path.relative_to(self.folder).as_posix() not in self.manifest["files"]:
            return None
        stored = ZeroShotClassifier.load(path)
        return stored if stored.labelset_hash == labelset.hash else None

    def labelset(self, name: str | Path) -> LabelSet:
        """The label set of that name: the one the bundle carries, else a shipped one or a YAML file."""
        carried = f"labelsets/{name}.yaml"
        return load_labelset(self.folder / carried if carried in self.manifest["files"] else name)

    def _pixels(self, image: str | Path | Image.Image) -> torch.Tensor:
        if isinstance(image, Image.Image):
            return self.preprocess(image)
        decoded = read_image(image)
        try:
            return self.preprocess(decoded)
        except DecodeError as error:
            raise UserError(f"image: cannot use {image}: {error}") from None

    def _nothing(self) -> NDArray[np.float32]:
        width = self.encode_texts(["nothing"]).shape[1]
        return np.zeros((0, width), dtype=np.float32)


def _refuse_single(items: Iterable[T]) -> Iterable[T]:
    """A single string is an iterable of characters, which nobody means."""
    if isinstance(items, str | Path):
        raise UserError(f"a list is expected, not the single value {str(items)!r}")
    return items


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
