"""Zero-shot classification: how near an image is to what is said for a label, and to what is said against it."""

import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from medclip_lab.errors import UserError
from medclip_lab.inference.labelset import LabelSet, unknown
from medclip_lab.inference.prompts import PromptTooLongError

if TYPE_CHECKING:
    from PIL import Image

    from medclip_lab.inference.calibration import Calibration
    from medclip_lab.inference.encoder import Encoder
    from medclip_lab.inference.ensemble import ClassifierEnsemble

ScoreType = Literal["mean_embedding", "mean_similarity", "max_similarity", "pair_softmax", "sigmoid"]
PROBABILITY_LIKE = ("pair_softmax", "sigmoid")
"""Rules whose scores lie in (0, 1); those of the others are cosines."""
LINEAR = ("mean_embedding", "mean_similarity", "pair_softmax")
"""Rules that need one product with the features for each label."""
BLOCK = 2**22
"""Similarities of images and prompts that are held at once."""

Floats = NDArray[np.float32]


class ZeroShotClassifier:
    """Scores for every label of a label set, from the features of images.

    With x the unit-norm features of an image, p those of the positive prompts of a label and n those of its negative
    ones, s the model's scale and b its bias, the rules are:

    - "mean_embedding": x m(p), where m is the mean of the prompts brought back to unit norm (CLIP).
    - "mean_similarity": the mean of x p over the prompts (MedCLIP's ensemble, CXR-CLIP).
    - "max_similarity": the greatest x p (GLoRIA).
    - "pair_softmax": exp(x m(p) / T) / (exp(x m(p) / T) + exp(x m(n) / T)), at the temperature T = 1 / s unless another
      is given (CheXzero takes T = 1).
    - "sigmoid", for models that were trained with a bias (SigLIP): the mean of sigmoid(s x p + b) over the prompts, the
      probability such a model learns for "this image and this text are a pair". A prompt that names another side than
      the image shows adds nothing and takes nothing away.

    The first three do not read negative prompts. All order images; none is the probability of a finding, and none comes
    with a decision, until it is calibrated. A label that is `none_of` others has 1 minus the greatest of their scores.

    Args:
        names: [K] labels.
        positive, negative: prompt features, unit norm, one [prompts, D] for each label; empty where it has none.
        logit_scale, logit_bias: of the model, the scale exponentiated.
        score_type: the rule; None takes "sigmoid" where there is a bias, else "pair_softmax", and "mean_embedding" for
            an exclusive set.
        temperature: of "pair_softmax".
        batch_zscore: subtract each label's mean over the images at hand and divide by their deviation (GLoRIA). The
            score of an image then depends on the others (transductive), which is why it is off.
        exclusive: just one label holds for an image.
        none_of: label -> the others it is the absence of.

    Raises:
        UserError: a rule that the model or the label set cannot serve.
    """

    def __init__(
        self,
        names: list[str],
        positive: list[Floats],
        negative: list[Floats],
        logit_scale: float,
        logit_bias: float | None,
        labelset: str,
        labelset_hash: str,
        score_type: ScoreType | None = None,
        encoder: "Encoder | None" = None,
        *,
        temperature: float | None = None,
        batch_zscore: bool = False,
        exclusive: bool = False,
        none_of: dict[str, list[str]] | None = None,
    ) -> None:
        fitting: ScoreType = "mean_embedding" if exclusive else "pair_softmax" if logit_bias is None else "sigmoid"
        self.names = names
        self.positive = [np.asarray(rows, dtype=np.float32) for rows in positive]
        self.negative = [np.asarray(rows, dtype=np.float32) for rows in negative]
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.labelset = labelset
        self.labelset_hash = labelset_hash
        self.score_type: ScoreType = score_type or fitting
        self.temperature = temperature
        self.batch_zscore = batch_zscore
        self.exclusive = exclusive
        self.none_of = none_of or {}
        self.calibration: Calibration | None = None
        self._encoder = encoder
        self._check_rule()

    def _check_rule(self) -> None:
        if self.score_type not in get_args(ScoreType):
            raise UserError(f"score: no rule is called {unknown(self.score_type, get_args(ScoreType))}")
        if self.score_type == "sigmoid" and self.logit_bias is None:
            raise UserError(
                "score: 'sigmoid' needs a model with a logit_bias; this one was trained without: take 'pair_softmax'"
            )
        if self.temperature is not None and (self.score_type != "pair_softmax" or not self.temperature > 0):
            raise UserError(
                f"score: a temperature is that of 'pair_softmax' and above 0; got {self.temperature:g} for "
                f"{self.score_type!r}"
            )
        if self.score_type == "pair_softmax":
            for name, rows in zip(self.names, self.negative, strict=True):
                if not len(rows) and name not in self.none_of:
                    raise UserError(
                        f"score: 'pair_softmax' needs negative prompts; {name} of label set {self.labelset} has none"
                    )

    @property
    def rule(self) -> str:
        """The rule with all that decides a score: what every result states."""
        text: str = self.score_type
        if self.score_type == "pair_softmax":
            text += f"(T={self._temperature:.4g})"
        return f"{text}, z-scored over the batch (transductive)" if self.batch_zscore else text

    @property
    def _temperature(self) -> float:
        return 1 / self.logit_scale if self.temperature is None else self.temperature

    @classmethod
    def from_prompts(
        cls,
        labelset: LabelSet,
        encode_texts: Callable[[list[str]], Floats],
        logit_scale: float,
        logit_bias: float | None = None,
        score_type: ScoreType | None = None,
        *,
        temperature: float | None = None,
        batch_zscore: bool = False,
    ) -> Self:
        """Encode the prompts of a label set, each distinct one once and all in one call of `encode_texts`.

        Raises:
            UserError: a prompt that is longer than the context, or a rule that does not fit.
        """
        prompts = {prompt: 0 for label in labelset.labels for prompt in (*label.positive, *label.negative)}
        for number, prompt in enumerate(prompts):
            prompts[prompt] = number
        try:
            features = encode_texts(list(prompts))
        except PromptTooLongError as error:
            raise too_long(labelset, error) from None

        def rows(texts: list[str]) -> Floats:
            return features[[prompts[text] for text in texts]]

        return cls(
            labelset.names,
            [rows(label.positive) for label in labelset.labels],
            [rows(label.negative) for label in labelset.labels],
            logit_scale,
            logit_bias,
            labelset.name,
            labelset.hash,
            score_type,
            temperature=temperature,
            batch_zscore=batch_zscore,
            exclusive=labelset.exclusive,
            none_of={label.name: label.none_of for label in labelset.labels if label.none_of},
        )

    def with_rule(
        self, score_type: ScoreType | None = None, *, temperature: float | None = None, batch_zscore: bool = False
    ) -> "ZeroShotClassifier":
        """The same prompts under another rule; None takes the one that fits the model."""
        return ZeroShotClassifier(
            self.names,
            self.positive,
            self.negative,
            self.logit_scale,
            self.logit_bias,
            self.labelset,
            self.labelset_hash,
            score_type,
            self._encoder,
            temperature=temperature,
            batch_zscore=batch_zscore,
            exclusive=self.exclusive,
            none_of=self.none_of,
        )

    def with_encoder(self, encoder: "Encoder") -> Self:
        """The same classifier, able to read images by itself."""
        self._encoder = encoder
        return self

    def scores(self, image_features: Floats) -> NDArray[np.float64]:
        """[N, K] scores of unit-norm features [N, D]; a row does not depend on the others, but for `batch_zscore`.

        float64, as a confident pair_softmax differs from 1 by less than float32 can tell.

        Raises:
            ValueError: features of another width.
            UserError: `batch_zscore` of less than two images.
        """
        width = next(rows.shape[1] for rows in self.positive if rows.ndim == 2 and len(rows))
        if image_features.ndim != 2 or image_features.shape[1] != width:
            raise ValueError(f"features {tuple(image_features.shape)} do not fit the classifier: [N, {width}]")
        # In double precision, and rounded to single: then it does not matter which other rows a product is taken with.
        features = np.asarray(image_features, dtype=np.float64)
        table = np.empty((len(features), len(self.names)))
        for column, name in enumerate(self.names):
            if name not in self.none_of:
                table[:, column] = self._column(features, column)
        for name, others in self.none_of.items():
            table[:, self.names.index(name)] = 1 - table[:, [self.names.index(other) for other in others]].max(1)
        if self.batch_zscore:
            table = _zscore(table)
        return table

    def _column(self, features: NDArray[np.float64], column: int) -> NDArray[np.float64]:
        if self.score_type in LINEAR:
            similarity = features @ self._directions[column]
            if self.score_type == "pair_softmax":
                return _sigmoid(_rounded(similarity / self._temperature))
            return _rounded(similarity)
        positive = self.positive[column].astype(np.float64)
        scores = np.empty(len(features))
        step = max(BLOCK // len(positive), 1)
        for start in range(0, len(features), step):
            similarity = features[start : start + step] @ positive.T
            if self.score_type == "max_similarity":
                scores[start : start + step] = similarity.max(1)
            else:
                assert self.logit_bias is not None
                scores[start : start + step] = _sigmoid(self.logit_scale * similarity + self.logit_bias).mean(1)
        return _rounded(scores)

    @cached_property
    def _directions(self) -> list[NDArray[np.float64]]:
        """For each label what a linear rule multiplies features with, [D]; nothing for one that is `none_of` others."""
        found = []
        for name, positive, negative in zip(self.names, self.positive, self.negative, strict=True):
            if name in self.none_of:
                found.append(np.empty(0))
            elif self.score_type == "mean_similarity":
                found.append(positive.astype(np.float64).mean(0))
            else:
                against = _mean(negative.astype(np.float64)) if self.score_type == "pair_softmax" else 0.0
                found.append(_mean(positive.astype(np.float64)) - against)
        return found

    def answers(self, image_features: Floats) -> list[dict[str, Any]]:
        """What `classify` gives, for features [N, D] alone."""
        return answers_of(self, self.scores(image_features), image_features)

    def classify(self, images: Iterable["str | Path | Image.Image"]) -> list[dict[str, Any]]:
        """For each image {"labels", "rule", "out_of_domain"}.

        "labels" are those of `predict`. "out_of_domain" is None without a calibration, else {"distance", "threshold",
        "flag"}; the flag says that the image is unlike those the calibration was made with, so that nothing else holds.
        """
        return self.answers(self.features(images))

    def predict(self, images: Iterable["str | Path | Image.Image"]) -> list[dict[str, dict[str, Any]]]:
        """For each image, label name to {"score", "score_type", "probability", "decision"}.

        The last two are None without a calibration; with one there are "threshold" and "operating" too: the probability
        brought to a scale on which the threshold is 0.5.
        """
        return [row["labels"] for row in self.classify(images)]

    def features(self, images: Iterable["str | Path | Image.Image"]) -> Floats:
        """[N, D] of images, by the encoder it was made with."""
        if self._encoder is None:
            raise ValueError("this classifier was built without an encoder: call answers() or scores() with features")
        return self._encoder.encode_images(images)

    @property
    def encoder(self) -> "Encoder | None":
        """What reads its images; None if it was made of features alone."""
        return self._encoder

    def save(self, path: Path) -> None:
        """Write as safetensors; names, rule and hash stand in its header."""
        facts = {
            "names": json.dumps(self.names),
            "labelset": self.labelset,
            "labelset_hash": self.labelset_hash,
            "score_type": self.score_type,
            "temperature": json.dumps(self.temperature),
            "exclusive": json.dumps(self.exclusive),
            "none_of": json.dumps(self.none_of),
        }
        tensors: dict[str, Any] = {"logit_scale": np.array(self.logit_scale, dtype=np.float64)}
        if self.logit_bias is not None:
            tensors["logit_bias"] = np.array(self.logit_bias, dtype=np.float64)
        for column in range(len(self.names)):
            tensors[f"positive.{column}"] = np.ascontiguousarray(self.positive[column])
            tensors[f"negative.{column}"] = np.ascontiguousarray(self.negative[column])
        save_file(tensors, path, metadata=facts)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: not such a file.
        """
        try:
            with safe_open(path, framework="np") as file:
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
                temperature=json.loads(facts.get("temperature", "null")),
                exclusive=json.loads(facts.get("exclusive", "false")),
                none_of=json.loads(facts.get("none_of", "{}")),
            )
        except Exception as error:  # safetensors raises its own kinds for every way a file can be broken
            raise UserError(f"classifier: cannot read {path}: {type(error).__name__}") from None


def answers_of(
    classifier: "ZeroShotClassifier | ClassifierEnsemble", scores: NDArray[np.float64], features: Floats
) -> list[dict[str, Any]]:
    """What `classify` gives, from scores [N, K] and the features [N, D] that tell whether an image is out of domain."""
    calibration = classifier.calibration
    strange = None if calibration is None else calibration.out_of_domain(features)
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(scores):
        labels = {}
        for name, score in zip(classifier.names, row, strict=True):
            said = {"score": float(score), "score_type": classifier.score_type, "probability": None, "decision": None}
            labels[name] = said | ({} if calibration is None else calibration.answer(name, float(score)))
        rows.append(
            {"labels": labels, "rule": classifier.rule, "out_of_domain": None if strange is None else strange[number]}
        )
    return rows


def _mean(prompts: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = prompts.mean(0)
    unit: NDArray[np.float64] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return unit


def _sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exact far below 0 too, where most scores of a SigLIP model lie."""
    value: NDArray[np.float64] = np.exp(-np.logaddexp(0, -z))
    return value


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """To the precision of float32: what is left of a sum does not depend on the order it was taken in."""
    return values.astype(np.float32).astype(np.float64)


def _zscore(table: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(table) < 2:
        raise UserError("score: a z-score over the batch needs two images at least; one has no deviation")
    deviation = table.std(0)
    # All images alike: none stands out, and 0 / 0 is no answer.
    scored: NDArray[np.float64] = (table - table.mean(0)) / np.where(deviation > 0, deviation, 1)
    return scored


def too_long(labelset: LabelSet, error: PromptTooLongError) -> UserError:
    """The same as a line that names the label."""
    owner = next(label for label in labelset.labels if error.prompt in (*label.positive, *label.negative))
    return UserError(
        f"label set {labelset.name}: a prompt of {owner.name} has {error.tokens} tokens, the context {error.context}: "
        f"shorten {error.prompt[:60]!r}, or allow truncation (--truncate)"
    )
