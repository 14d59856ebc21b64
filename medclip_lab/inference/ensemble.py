"""Several checkpoints answering together, as CheXzero's ten do."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.inference.calibration import Calibration, logit
from medclip_lab.inference.classifier import PROBABILITY_LIKE, Floats, ZeroShotClassifier, answers_of

if TYPE_CHECKING:
    from PIL import Image

Average = Literal["scores", "logits"]


class ClassifierEnsemble:
    """The mean over classifiers of one label set and rule, of their scores or of their scores' logits.

    The calibration of a member is not that of the mean: an ensemble has its own, which the bundle of its first member
    keeps, and which holds for just these members in this order.

    Args:
        calibrated: take that calibration, where the members come from bundles and there is one for their rule.

    Raises:
        UserError: members that cannot be averaged.
    """

    def __init__(
        self, members: Sequence[ZeroShotClassifier], average: Average = "scores", calibrated: bool = True
    ) -> None:
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
        made = self.made_for_members() if calibrated else None
        self.calibration = made if made is not None and made.fits(self.rule, self.labelset_hash) else None

    def made_for_members(self) -> Calibration | None:
        """The calibration that the first member's bundle keeps for these members, whatever rule it was made for."""
        encoders = [member.encoder for member in self.members if member.encoder is not None]
        if len(encoders) < len(self.members):
            return None
        return Calibration.load(encoders[0].folder, self.labelset, [encoder.fingerprint for encoder in encoders])

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
        """As `ZeroShotClassifier.classify`; out of domain is told by the features of all members side by side."""
        everything = list(images)
        features = [member.features(everything) for member in self.members]
        return answers_of(self, self.scores(features), np.concatenate(features, axis=1))
