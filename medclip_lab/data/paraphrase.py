"""Phrases that may stand for each other, given by the user and put into texts at random."""

import functools
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medclip_lab.errors import UserError
from medclip_lab.files import read_json

WHAT = "text.paraphrases"


class Paraphrases:
    """Replaces phrases in texts.

    Args:
        sets: phrase -> what may stand in its place. They must state the same: labels of a text are not read again.
    """

    def __init__(self, sets: Mapping[str, Sequence[str]]) -> None:
        self._sets = {_folded(phrase): tuple(alternatives) for phrase, alternatives in sets.items()}
        # The longest first, so that "no definite" is not read as "no".
        phrases = sorted((re.escape(phrase) for phrase in self._sets), key=len, reverse=True)
        self._any = re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)

    def __call__(self, text: str, chance: random.Random) -> str:
        """The text with each known phrase, in any case, replaced by one of its alternatives or left, all alike likely.

        A capital at the start of a phrase is kept.
        """

        def replace(match: re.Match[str]) -> str:
            written = match.group()
            chosen = chance.choice((written, *self._sets[_folded(written)]))
            return chosen[:1].upper() + chosen[1:] if written[:1].isupper() else chosen

        return self._any.sub(replace, text)


@functools.cache
def load_paraphrases(path: str) -> Paraphrases:
    """Read a YAML or JSON file of phrases and their alternatives:

        pleural effusion: [fluid in the pleural space, pleural fluid]
        is normal: [is unremarkable]

    Raises:
        UserError: no such file, or not phrases with lists of phrases.
    """
    sets = _read(Path(path).expanduser())
    if not isinstance(sets, dict) or not sets:
        raise UserError(f"{WHAT}: {path} must map phrases to lists of phrases")
    for phrase, alternatives in sets.items():
        listed = isinstance(alternatives, list) and alternatives and all(isinstance(a, str) and a for a in alternatives)
        if not (isinstance(phrase, str) and phrase.strip() and listed):
            raise UserError(f"{WHAT}: {path}: {phrase!r} needs a list of phrases, got {alternatives!r}")
    return Paraphrases(sets)


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".json":
        return read_json(path, WHAT)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{WHAT}: no such file: {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{WHAT}: cannot read {path}: {' '.join(str(error).split())}") from None


def _folded(phrase: str) -> str:
    return " ".join(phrase.lower().split())
