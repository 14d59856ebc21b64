"""The fourteen observations of CheXpert and the four states a report can give one (Irvin et al., AAAI 2019)."""

from collections.abc import Mapping

NO_FINDING = "No Finding"
SUPPORT_DEVICES = "Support Devices"

CHEXPERT14: tuple[str, ...] = (
    NO_FINDING,
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    SUPPORT_DEVICES,
)

PRESENT, ABSENT, UNCERTAIN = 1, 0, -1  # an unmentioned observation is None (blank in CSV, NaN in tensors)

Labels = Mapping[str, int | None]
"""Label name to 1 (present), 0 (absent), -1 (uncertain) or None (not mentioned)."""
