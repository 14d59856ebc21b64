"""Label sets: the names a classifier answers for, and the prompts that stand for each."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from medclip_lab.config import load_config, shipped
from medclip_lab.errors import UserError
from medclip_lab.files import digest


@dataclass
class LabelPrompts:
    """One label and the sentences for and against it."""

    name: str
    positive: list[str]
    negative: list[str]


@dataclass
class LabelSet:
    """A named list of labels, each judged apart from the others (multi-label)."""

    name: str
    labels: list[LabelPrompts] = field(default_factory=list)
    description: str = ""

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError(f"label set {self.name}: it has no labels")
        names = [label.name for label in self.labels]
        if len(set(names)) < len(names):
            raise ValueError(f"label set {self.name}: a name stands twice")
        for label in self.labels:
            if not label.positive or not label.negative:
                raise ValueError(f"label set {self.name}: {label.name} needs positive and negative prompts")

    @property
    def names(self) -> list[str]:
        return [label.name for label in self.labels]

    @property
    def hash(self) -> str:
        """Changes with any name or prompt."""
        return digest([(label.name, label.positive, label.negative) for label in self.labels])


def load_labelset(name: str | Path) -> LabelSet:
    """A label set by file, or by the name of a shipped one ("chexpert14").

    Raises:
        UserError: no such set, or one that is not well formed.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise UserError(f"label set: {name!r} is neither a .yaml file nor the name of a shipped set")
        path = shipped(f"labelsets/{name}.yaml")
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
            raise UserError(f"label set: no shipped set is called {name!r} (there are {known})")
    return load_config(LabelSet, path)
