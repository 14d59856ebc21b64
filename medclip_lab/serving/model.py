"""The bundle and its indexes, as the service uses them; everything here that computes runs on the model's thread."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from medclip_lab.data.preprocess import stack
from medclip_lab.errors import UserError
from medclip_lab.inference.bundle import CARD, FORMER_CARD
from medclip_lab.inference.encoder import load
from medclip_lab.inference.explain import Explanation, explain
from medclip_lab.inference.labelset import LabelSet, load_labelset
from medclip_lab.inference.onnx_towers import with_onnx
from medclip_lab.serving.indexes import Served, open_indexes
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.settings import Settings

Floats = NDArray[np.float32]


class Model:
    """Both towers, the bundle's label sets, and the indexes built with it.

    Raises:
        UserError: no bundle, an index of another bundle, two indexes of one name, no such label set.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.onnx is None:
            self.encoder = load(settings.bundle, settings.device)
        else:
            device = "cpu" if settings.device == "auto" else settings.device
            self.encoder = with_onnx(load(settings.bundle, device), settings.onnx)
        self.name = settings.bundle.expanduser().resolve().name
        self.preprocess = self.encoder.preprocess
        self.indexes = open_indexes(settings, self.encoder.fingerprint)
        self.labelsets = self._labelsets()
        if settings.labelset is not None and settings.labelset not in self.labelsets:
            raise UserError(
                f"serve: the bundle has no label set {settings.labelset!r} (there are {', '.join(self.labelsets)})"
            )
        self.labelset = settings.labelset or next(iter(self.labelsets), None)
        self.classifiers = {
            name: self.encoder.zero_shot_classifier(labelset) for name, labelset in self.labelsets.items()
        }
        self._bfloat16 = settings.precision == "bfloat16"
        self._visual = self.encoder.model.model.visual
        self.can_explain = self._can_explain()
        if settings.compile:
            self.encoder.model.model.visual = torch.compile(self._visual, dynamic=True)

    def _labelsets(self) -> dict[str, LabelSet]:
        carried = [name for name in self.encoder.manifest["files"] if name.startswith("labelsets/")]
        sets = [load_labelset(self.encoder.folder / name) for name in sorted(carried)]
        return {labelset.name: labelset for labelset in sets}

    @property
    def hashes(self) -> dict[str, str]:
        """What decides an embedding."""
        files = self.encoder.manifest["files"]
        return {
            "name": self.name,
            "fingerprint": self.encoder.fingerprint,
            "weights": files["open_clip_model.safetensors"],
            "preprocess": files["preprocess.json"],
        }

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.encode_texts(["width"])[0].shape[0])

    @property
    def card(self) -> str:
        """The model card, Markdown."""
        folder = self.encoder.folder
        path = folder / CARD if (folder / CARD).exists() else folder / FORMER_CARD
        return path.read_text(encoding="utf-8")

    @torch.inference_mode()
    def encode_images(self, pixels: Sequence[Tensor]) -> Floats:
        """[N, D], unit norm."""
        model = self.encoder.model
        with self._precision():
            features = model.encode_image(stack(list(pixels)).to(model.mean.device))
        rows: Floats = features.float().cpu().numpy()
        return rows

    def encode_texts(self, texts: Sequence[str]) -> Floats:
        """[N, D], unit norm."""
        with self._precision():
            return self.encoder.encode_texts(list(texts))

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if not self._bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.encoder.model.mean.device.type, torch.bfloat16)

    def tokens(self, text: str) -> tuple[int, int]:
        """How many tokens a text has, start and end included, and how many the text tower reads."""
        tokenizer = self.encoder.tokenizer
        context = int(tokenizer.context_length or self.encoder.model.model.context_length)
        if hasattr(tokenizer, "tokenizer"):  # open_clip's wrapper of Hugging Face's
            return len(tokenizer.tokenizer(text)["input_ids"]), context
        return len(tokenizer.encode(text)) + 2, context

    def index(self, name: str | None) -> Served:
        """An index by name; the only one needs no name.

        Raises:
            Problem: there is none, or no such one.
        """
        if not self.indexes:
            raise Problem(404, "no-index", "this service has no index: start it with --index DIR")
        if name is None and len(self.indexes) == 1:
            return next(iter(self.indexes.values()))
        if name is None or name not in self.indexes:
            known = ", ".join(self.indexes)
            raise Problem(404, "unknown-index", f"name one of the indexes as `index`: {known}")
        return self.indexes[name]

    def explain(self, image: Image.Image, positive: Sequence[str], negative: Sequence[str] = ()) -> Explanation:
        """A map of what moved the similarity of an image to prompts, less that to those against.

        Raises:
            UserError: this tower cannot be looked into.
        """
        network = self.encoder.model.model
        served = network.visual
        network.visual = self._visual  # what is compiled shows no stage of its own
        try:
            return explain(self.encoder, image, positive, negative)
        finally:
            network.visual = served

    def _can_explain(self) -> bool:
        try:
            self.explain(Image.new("L", (8, 8)), ["width"])
        except UserError:
            return False
        return True
