"""Zero-shot classification: how near an image is to what is said for a label, and to what is said against it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

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

ScoreType = Literal["sigmoid", "pair_softmax"]


class ZeroShotClassifier:
    """Scores for every label of a label set, from the features of images.

    Two rules, s being the model's scale, b its bias, and x the unit-norm features of an image:

    - "sigmoid", for models that were trained with a bias (SigLIP): the mean of sigmoid(s x p + b) over the positive
      prompts p, which is the probability such a model learns for "this image and this text are a pair". A prompt that
      names another side than the image shows adds nothing and takes nothing away.
    - "pair_softmax", for models that only learn to order: exp(s x p) / (exp(s x p) + exp(s x n)), where p and n are the
      means (unit norm, mean, unit norm) of the positive and of the negative prompts.

    Both order images; neither is the probability of a finding, and none comes with a decision, until it is calibrated.

    Args:
        names: [K] labels.
        positive, negative: prompt features, unit norm, one [prompts, D] for each label.
        logit_scale, logit_bias: of the model, the scale exponentiated.
        score_type: the rule; None takes "sigmoid" where there is a bias.
    """

    def __init__(
        self,
        names: list[str],
        positive: list[Tensor],
        negative: list[Tensor],
        logit_scale: float,
        logit_bias: float | None,
        labelset: str,
        labelset_hash: str,
        score_type: ScoreType | None = None,
        encoder: "Encoder | None" = None,
    ) -> None:
        if score_type == "sigmoid" and logit_bias is None:
            raise ValueError("score_type 'sigmoid' needs a model with a bias; this one was trained without")
        self.names = names
        self.positive = positive
        self.negative = negative
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.labelset = labelset
        self.labelset_hash = labelset_hash
        self.score_type: ScoreType = score_type or ("pair_softmax" if logit_bias is None else "sigmoid")
        self._encoder = encoder

    @classmethod
    def from_prompts(
        cls,
        labelset: LabelSet,
        encode_texts: Callable[[list[str]], NDArray[np.float32]],
        logit_scale: float,
        logit_bias: float | None = None,
        score_type: ScoreType | None = None,
    ) -> Self:
        """Encode the prompts of a label set."""
        return cls(
            labelset.names,
            [torch.from_numpy(encode_texts(label.positive)) for label in labelset.labels],
            [torch.from_numpy(encode_texts(label.negative)) for label in labelset.labels],
            logit_scale,
            logit_bias,
            labelset.name,
            labelset.hash,
            score_type,
        )

    def with_encoder(self, encoder: "Encoder") -> Self:
        """The same classifier, able to read images by itself."""
        self._encoder = encoder
        return self

    def scores(self, image_features: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, K] scores in (0, 1) of unit-norm features [N, D]; a row does not depend on the others."""
        features = torch.from_numpy(np.ascontiguousarray(image_features, dtype=np.float32))
        width = self.positive[0].shape[1]
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"features {tuple(features.shape)} do not fit the classifier: [N, {width}]")
        if self.score_type == "sigmoid":
            assert self.logit_bias is not None
            bias = self.logit_bias
            columns = [torch.sigmoid(self.logit_scale * features @ rows.T + bias).mean(1) for rows in self.positive]
        else:
            columns = [
                torch.sigmoid(self.logit_scale * (features @ (_mean(positive) - _mean(negative))))
                for positive, negative in zip(self.positive, self.negative, strict=True)
            ]
        scores: NDArray[np.float32] = torch.stack(columns, dim=1).numpy()
        return scores

    def predict(self, images: Iterable["str | Path | Image.Image"]) -> list[dict[str, dict[str, Any]]]:
        """For each image, label name to {"score", "score_type", "probability", "decision"}; the last two are None."""
        if self._encoder is None:
            raise ValueError("this classifier was built without an encoder: call scores() with features")
        rows = self.scores(self._encoder.encode_images(images))
        return [
            {
                name: {"score": float(score), "score_type": self.score_type, "probability": None, "decision": None}
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
            "score_type": self.score_type,
        }
        tensors = {"logit_scale": torch.tensor(self.logit_scale, dtype=torch.float64)}
        if self.logit_bias is not None:
            tensors["logit_bias"] = torch.tensor(self.logit_bias, dtype=torch.float64)
        for column in range(len(self.names)):
            tensors[f"positive.{column}"] = self.positive[column].contiguous()
            tensors[f"negative.{column}"] = self.negative[column].contiguous()
        save_file(tensors, path, metadata=facts)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: not such a file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            names = json.loads(facts["names"])
            return cls(
                names,
                [tensors[f"positive.{column}"] for column in range(len(names))],
                [tensors[f"negative.{column}"] for column in range(len(names))],
                float(tensors["logit_scale"]),
                float(tensors["logit_bias"]) if "logit_bias" in tensors else None,
                facts["labelset"],
                facts["labelset_hash"],
                cast(ScoreType, facts["score_type"]),
            )
        except Exception as error:  # safetensors raises its own kinds for every way a file can be broken
            raise UserError(f"classifier: cannot read {path}: {type(error).__name__}") from None


def _mean(prompts: Tensor) -> Tensor:
    return F.normalize(prompts.mean(0), dim=0)
