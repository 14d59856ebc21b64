"""Zero-shot classification: an image is nearer to what is said for a label, or to what is said against it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from medclip_lab.errors import UserError
from medclip_lab.inference.labelset import LabelSet

if TYPE_CHECKING:
    from PIL import Image

    from medclip_lab.inference.encoder import Encoder

SCORE_TYPE = "pair_softmax"


class ZeroShotClassifier:
    """Scores for every label of a label set, from the features of images.

    The score of a label is exp(s x p) / (exp(s x p) + exp(s x n)): p and n are the cosines of the image with the mean
    of the positive and of the negative prompts, s is the model's own scale. It orders images; it is not a probability
    and comes without a decision until it is calibrated.
    """

    def __init__(
        self,
        names: list[str],
        positive: Tensor,
        negative: Tensor,
        logit_scale: float,
        labelset: str,
        labelset_hash: str,
        encoder: "Encoder | None" = None,
    ) -> None:
        self.names = names
        self.positive = positive
        self.negative = negative
        self.logit_scale = logit_scale
        self.labelset = labelset
        self.labelset_hash = labelset_hash
        self._encoder = encoder

    @classmethod
    def from_prompts(
        cls, labelset: LabelSet, encode_texts: Callable[[list[str]], NDArray[np.float32]], logit_scale: float
    ) -> Self:
        """Encode the prompts of a label set and average each side: unit norm, mean, unit norm."""

        def side(prompts_of: Callable[[Any], list[str]]) -> Tensor:
            rows = [torch.from_numpy(encode_texts(prompts_of(label))).mean(0) for label in labelset.labels]
            return F.normalize(torch.stack(rows), dim=-1)

        return cls(
            labelset.names,
            side(lambda label: label.positive),
            side(lambda label: label.negative),
            logit_scale,
            labelset.name,
            labelset.hash,
        )

    def with_encoder(self, encoder: "Encoder") -> Self:
        """The same classifier, able to read images by itself."""
        self._encoder = encoder
        return self

    def scores(self, image_features: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, K] scores in (0, 1) of unit-norm features [N, D]; a row does not depend on the others."""
        features = torch.from_numpy(np.ascontiguousarray(image_features, dtype=np.float32))
        if features.ndim != 2 or features.shape[1] != self.positive.shape[1]:
            raise ValueError(
                f"features {tuple(features.shape)} do not fit the classifier: [N, {self.positive.shape[1]}]"
            )
        scores: NDArray[np.float32] = torch.sigmoid(
            self.logit_scale * (features @ self.positive.T - features @ self.negative.T)
        ).numpy()
        return scores

    def predict(self, images: Iterable["str | Path | Image.Image"]) -> list[dict[str, dict[str, Any]]]:
        """For each image, label name to {"score", "score_type", "probability", "decision"}; the last two are None."""
        if self._encoder is None:
            raise ValueError("this classifier was built without an encoder: call scores() with features")
        rows = self.scores(self._encoder.encode_images(images))
        return [
            {
                name: {"score": float(score), "score_type": SCORE_TYPE, "probability": None, "decision": None}
                for name, score in zip(self.names, row, strict=True)
            }
            for row in rows
        ]

    def save(self, path: Path) -> None:
        """Write as safetensors; names and hash stand in its header."""
        facts = {
            "names": json.dumps(self.names),
            "labelset": self.labelset,
            "labelset_hash": self.labelset_hash,
            "score_type": SCORE_TYPE,
        }
        scale = torch.tensor(self.logit_scale, dtype=torch.float64)
        save_file(
            {"positive": self.positive.contiguous(), "negative": self.negative.contiguous(), "logit_scale": scale},
            path,
            metadata=facts,
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: not such a file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("positive", "negative", "logit_scale")}
            return cls(
                json.loads(facts["names"]),
                tensors["positive"],
                tensors["negative"],
                float(tensors["logit_scale"]),
                facts["labelset"],
                facts["labelset_hash"],
            )
        except Exception as error:  # safetensors raises its own kinds for every way a file can be broken
            raise UserError(f"classifier: cannot read {path}: {type(error).__name__}") from None
