"""Several checkpoints answering together, as CheXzero's ten do."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.inference.calibration import logit
from medclip_lab.inference.classifier import PROBABILITY_LIKE, Floats, ZeroShotClassifier

if TYPE_CHECKING:
    from PIL import Image

Average = Literal["scores", "logits"]


class ClassifierEnsemble:
    """The mean over classifiers of one label set and rule, of their scores or of their scores' logits.

    It has no calibration: that of a member is not that of the mean.

    Raises:
        UserError: members that cannot be averaged.
    """

    calibration = None

    def __init__(self, members: Sequence[ZeroShotClassifier], average: Average = "scores") -> None:
        first = members[0]
        for member in members[1:]:
            if member.labelset_hash != first.labelset_hash or member.score_type != first.score_type:
                raise UserError(
                    f"ensemble: its members differ: label set {first.labelset!r} by {first.score_type}, "
                    f"{member.labelset!r} by {member.score_type}"
                )
        if average == "logits" and first.score_type not in PROBABILITY_LIKE:
            raise UserError(
                f"ensemble: scores by {first.score_type!r} are cosines and have no logits: average the scores"
            )
        self.members = list(members)
        self.average = average
        self.names, self.exclusive = first.names, first.exclusive
        self.labelset, self.labelset_hash, self.score_type = first.labelset, first.labelset_hash, first.score_type

    @property
    def rule(self) -> str:
        """What every result states."""
        rules = sorted({member.rule for member in self.members})
        return f"mean {self.average} of {len(self.members)} checkpoints, {' and '.join(rules)}"

    def scores(self, image_features: Sequence[Floats]) -> NDArray[np.float64]:
        """[N, K] from the features of each member, [N, D] each; D may differ."""
        tables = [member.scores(rows) for member, rows in zip(self.members, image_features, strict=True)]
        if self.average == "scores":
            return np.asarray(np.mean(tables, axis=0))
        return np.asarray(np.exp(-np.logaddexp(0, -np.mean([logit(table) for table in tables], axis=0))))

    def classify(self, images: Iterable["str | Path | Image.Image"]) -> list[dict[str, Any]]:
        """As `ZeroShotClassifier.classify`, without probabilities."""
        everything = list(images)
        table = self.scores([member.features(everything) for member in self.members])
        said = {"score_type": self.score_type, "probability": None, "decision": None}
        return [
            {
                "labels": {name: {"score": float(score)} | said for name, score in zip(self.names, row, strict=True)},
                "rule": self.rule,
                "out_of_domain": None,
            }
            for row in table
        ]
