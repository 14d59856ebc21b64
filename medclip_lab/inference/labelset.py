"""Label sets: the names a classifier answers for, and the prompts that stand for each."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path

from medclip_lab.config import load_config, shipped
from medclip_lab.errors import UserError
from medclip_lab.files import digest
from medclip_lab.inference.grid import drawn, sentences

GAP = re.compile(r"\{a?\}")


@dataclass
class Templates:
    """Sentences with a gap, for and against whatever fills it."""

    positive: list[str]
    """Each with one gap: "{}" for the term alone ("No {}."), "{a}" for the term with its article ("There is {a}.")."""
    negative: list[str] = field(default_factory=list)
    name: str = ""
    description: str = ""
    source: str = ""
    """Where the sentences come from."""
    license: str = ""
    """Under which licence they may be passed on."""

    def __post_init__(self) -> None:
        for template in (*self.positive, *self.negative):
            if len(GAP.findall(template)) != 1 or re.search(r"[{}]", GAP.sub("", template)):
                raise ValueError(f"templates: {template!r} needs one {{}} or {{a}} and no other brace")

    def fill(self, terms: list[str]) -> tuple[list[str], list[str]]:
        """Every positive and every negative sentence about every term, the first letter a capital."""
        positive, negative = (
            [_sentence(_filled(template, term)) for term in terms for template in templates]
            for templates in (self.positive, self.negative)
        )
        return positive, negative


@dataclass
class LabelPrompts:
    """One label and the sentences for and against it."""

    name: str
    positive: list[str] = field(default_factory=list)
    """Sentences that say it is there."""
    negative: list[str] = field(default_factory=list)
    """Sentences that say it is not; an exclusive set needs none."""
    terms: list[str] = field(default_factory=list)
    """What fills the set's templates, in the singular: "edema", or with its article "a pleural effusion". Their
    sentences are added to the prompts above."""
    grid: list[list[str]] = field(default_factory=list)
    """Parts of positive prompts: one entry of each list, joined by blanks, in every combination; one may be empty."""
    negative_grid: list[list[str]] = field(default_factory=list)
    """The same for negative prompts."""
    none_of: list[str] = field(default_factory=list)
    """For "No Finding": names of other labels. Its score is 1 minus the greatest of theirs, and it has no prompts."""


@dataclass
class LabelSet:
    """A named list of labels, each judged apart from the others unless the set is exclusive."""

    name: str
    labels: list[LabelPrompts] = field(default_factory=list)
    description: str = ""
    source: str = ""
    """Where names and prompts come from."""
    license: str = ""
    """Under which licence the prompts may be passed on."""
    exclusive: bool = False
    """True: just one label holds for an image (the greatest score wins). False: any number (multi-label)."""
    templates: str = ""
    """Name of shipped templates or a YAML file, for the labels that give terms."""
    draw: int = 0
    """How many sentences of each grid are taken, the first by SHA-256 of "seed:sentence"; 0 takes all. What was drawn
    stands among the prompts of a set that is written to a bundle, and number and seed still say how."""
    seed: int = 0
    groups: dict[str, list[str]] = field(default_factory=dict)
    """Names of labels whose mean is reported too."""

    def __post_init__(self) -> None:
        where = f"label set {self.name}"
        if not self.labels:
            raise ValueError(f"{where}: it has no labels")
        names = [label.name for label in self.labels]
        if len(set(names)) < len(names):
            raise ValueError(f"{where}: a name stands twice")
        if self.draw < 0:
            raise ValueError(f"{where}: draw is a number of sentences, or 0 for all; got {self.draw}")
        if any(label.terms for label in self.labels):
            self._fill(load_templates(self.templates) if self.templates else None)
        for label in self.labels:
            self._draw(label, where)
        for label in self.labels:
            self._check(label, where)
        for group, members in self.groups.items():
            for member in members:
                if member not in names:
                    raise ValueError(f"{where}: group {group} names {unknown(member, names)}")

    def _fill(self, templates: Templates | None) -> None:
        for label in self.labels:
            if not label.terms:
                continue
            if templates is None:
                raise ValueError(f"label set {self.name}: {label.name} has terms, and the set names no templates")
            if means_nothing(label.name):
                raise ValueError(
                    f"label set {self.name}: {label.name} cannot fill templates, which would deny a denial: give it "
                    "prompts of its own, or none_of"
                )
            positive, negative = templates.fill(label.terms)
            label.positive, label.negative, label.terms = label.positive + positive, label.negative + negative, []
        self.templates = ""  # nothing is left to fill: what is written to a bundle says all

    def _draw(self, label: LabelPrompts, where: str) -> None:
        """The sentences of a label's grids among its prompts; nothing is left to draw."""
        try:
            label.positive = label.positive + self._of_grid(label.grid)
            label.negative = label.negative + self._of_grid(label.negative_grid)
        except ValueError as error:
            raise ValueError(f"{where}: {label.name}: {error}") from None
        label.grid, label.negative_grid = [], []

    def _of_grid(self, grid: list[list[str]]) -> list[str]:
        if not grid:
            return []
        if not all(grid):
            raise ValueError('a list of its grid is empty: write "" for a part that may be left out')
        return drawn(sentences(grid), self.draw, self.seed)

    def _check(self, label: LabelPrompts, where: str) -> None:
        if label.none_of:
            if self.exclusive or label.positive or label.negative:
                raise ValueError(
                    f"{where}: {label.name} has none_of, which needs a set that is not exclusive and no prompts"
                )
            others = [other.name for other in self.labels if not other.none_of]
            for name in label.none_of:
                if name not in others:
                    raise ValueError(f"{where}: none_of of {label.name} names {unknown(name, others)}")
        elif not label.positive or not (label.negative or self.exclusive):
            raise ValueError(f"{where}: {label.name} needs positive and negative prompts")
        for prompt in (*label.positive, *label.negative):
            if not prompt.strip() or re.match(r"no no\b", prompt.casefold()):
                raise ValueError(f"{where}: {label.name} has the prompt {prompt!r}, which says nothing")

    @property
    def names(self) -> list[str]:
        return [label.name for label in self.labels]

    @property
    def hash(self) -> str:
        """Changes with any name or prompt, and with how they are scored; not with description, source or groups."""
        grids = ("grid", "negative_grid")  # their sentences stand among the prompts
        prompts = [{name: value for name, value in asdict(label).items() if name not in grids} for label in self.labels]
        return digest([self.exclusive, prompts])


def means_nothing(name: str) -> bool:
    """Whether a label says that there is no finding: the one that "no {}" would turn upside down."""
    return name.casefold() in ("no finding", "no findings", "normal", "no abnormality")


def unknown(name: str, known: Sequence[str]) -> str:
    """A name that is not among those known, with the nearest of them."""
    near = get_close_matches(name, known, n=1, cutoff=0.4)
    return f"{name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def load_labelset(name: str | Path) -> LabelSet:
    """A label set by file, or by the name of a shipped one ("chexpert14").

    Raises:
        UserError: no such set, or one that is not well formed.
    """
    return load_config(LabelSet, find_labelset(name))


def find_labelset(name: str | Path) -> Path:
    """The file of a label set.

    Raises:
        UserError: no such set.
    """
    return _find(name, "labelsets", "label set", "set")


def load_templates(name: str | Path) -> Templates:
    """Templates by file, or by the name of shipped ones ("radiograph").

    Raises:
        UserError: no such templates, or some that are not well formed.
    """
    return load_config(Templates, _find(name, "templates", "templates", "file of templates"))


def _find(name: str | Path, folder: str, what: str, kind: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return path
    if not re.fullmatch(r"[\w-]+", str(name)):
        raise UserError(f"{what}: {str(name)!r} is neither a .yaml file nor the name of a shipped {kind}")
    path = shipped(f"{folder}/{name}.yaml")
    if not path.exists():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        near = get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{what}: no shipped {kind} is called {str(name)!r} (there are {', '.join(known)}){hint}")
    return path


def _filled(template: str, term: str) -> str:
    bare = re.sub(r"^an? ", "", term)
    return template.replace("{}", bare).replace("{a}", term)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
