"""Sentences made from labels, for studies that have labels and no report, and to teach a tower what a prompt is."""

import random
from dataclasses import dataclass, field

from medclip_lab.data.findings import ABSENT, NO_FINDING, PRESENT, UNCERTAIN


@dataclass
class PromptConfig:
    """Templates by the state of a label; "{}" is where its name goes. A state without templates is not spoken of."""

    present: list[str] = field(default_factory=lambda: ["{}.", "There is {}.", "{} is present."])
    absent: list[str] = field(default_factory=lambda: ["No {}.", "There is no {}.", "No evidence of {}."])
    uncertain: list[str] = field(default_factory=lambda: ["Possible {}.", "{} cannot be excluded."])
    names: dict[str, str] = field(
        default_factory=lambda: {
            NO_FINDING: "acute cardiopulmonary abnormality",
            "Enlarged Cardiomediastinum": "mediastinal widening",
            "Pleural Other": "pleural thickening",
            "Support Devices": "support device",
        }
    )
    """What a label is called; others by their own name in lower case. "No Finding" is named by its opposite, and its
    states are spoken of as those of the opposite."""

    def __post_init__(self) -> None:
        for template in (*self.present, *self.absent, *self.uncertain):
            if template.count("{}") != 1:
                raise ValueError(f"text.prompts: {template!r} must hold {{}} once, where the name goes")

    def of(self, label: str, state: int) -> list[str]:
        """The templates for a label in a state."""
        if label == NO_FINDING and state != UNCERTAIN:
            state = ABSENT if state == PRESENT else PRESENT
        return {PRESENT: self.present, ABSENT: self.absent, UNCERTAIN: self.uncertain}[state]

    def sentence(self, label: str, state: int, chance: random.Random) -> str:
        """A sentence that states it; there must be a template."""
        name = self.names.get(label) or label.replace("_", " ").lower()
        text = chance.choice(self.of(label, state)).format(name)
        return text[:1].upper() + text[1:]
