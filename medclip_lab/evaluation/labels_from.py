"""Where the labels of studies are told: a field of their records, or a table with a row for each."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from medclip_lab.data.findings import ABSENT, PRESENT, UNCERTAIN
from medclip_lab.data.sources.common import read_table
from medclip_lab.data.sources.tables import label_value
from medclip_lab.data.sources.vindr_cxr import state_of_votes
from medclip_lab.errors import UserError
from medclip_lab.files import sha256

Record = Mapping[str, Any]
States = dict[str, int | None]
LABELS = "labels"
"""The field that every reader fills, under CheXpert's names where it has a word for a finding."""
VOTES = "votes"
"""The field in which a record counts who saw a finding."""
_COUNTED = {PRESENT: "present", ABSENT: "absent", UNCERTAIN: "uncertain", None: "unknown"}


def same_name(name: str) -> str:
    """A label name as it is compared: "Pleural_Thickening" is "pleural thickening"."""
    return " ".join(name.replace("_", " ").casefold().split())


class LabelsFrom:
    """Labels of studies by a field of their records, or by a table.

    A field holds names to states (1, 0, -1 for uncertain, None or NaN for unknown), a list of the names that are
    present, or "votes": names to how many of the "readers" saw it. A list, and votes, deny what they do not name.

    A table (.csv or .tsv) has a line of column names. The first column is named as the field of the records that it is
    matched with ("study_id", or any other; of a field with a value for each image the image at hand counts), the others
    as labels, with 1, 0, -1 and blank or nan in their cells. A study without a row is not labelled.

    Args:
        where: name of a field, or path of a table.

    Raises:
        UserError: a table that cannot be read, or that has an id twice.
    """

    def __init__(self, where: str = LABELS) -> None:
        self.where = where
        path = Path(where).expanduser()
        self._rows: dict[str, tuple[int, dict[str, str]]] | None = None
        self._sha256: str | None = None
        if path.suffix.lower() not in (".csv", ".tsv"):
            return
        columns, rows = read_table(path)
        self._key, self._columns = columns[0], columns[1:]
        self._alike: dict[str, list[str]] = {}
        for column in self._columns:
            self._alike.setdefault(same_name(column), []).append(column)
        self._rows = {}
        for line, row in rows:
            if row[self._key] in self._rows:
                raise UserError(f"{path}, line {line}: an id of column {self._key!r} stands there twice")
            self._rows[row[self._key]] = line, row
        self._sha256 = sha256(path)

    def of(self, record: Record, names: Sequence[str]) -> States:
        """The states of a study, those of `names` in their spelling; a field's other names stay as they are.

        Raises:
            UserError: a value that is no state, or two names of one label.
        """
        if self._rows is not None:
            return self._of_row(record, names)
        value = record.get(self.where)
        if self.where == VOTES and isinstance(value, dict):
            readers = int(record.get("readers") or 1)
            stated: States = {name: state_of_votes(count, readers) for name, count in value.items()}
            silent: int | None = ABSENT
        elif isinstance(value, list):
            stated, silent = dict.fromkeys(map(str, value), PRESENT), ABSENT
        elif isinstance(value, dict):
            told = f"--labels-from {self.where}"
            stated, silent = {name: label_value(state, told, name) for name, state in value.items()}, None
        else:
            return {}
        spelled = {same_name(name): name for name in names}
        found: States = {}
        for name, state in stated.items():
            own = spelled.get(same_name(name), name)
            if found.setdefault(own, state) != state:
                raise UserError(
                    f"--labels-from {self.where}: a study has {own!r} twice, and says another thing of each"
                )
        return (dict.fromkeys(names, silent) if silent is not None else {}) | found

    def _of_row(self, record: Record, names: Sequence[str]) -> States:
        assert self._rows is not None
        key = record.get(self._key)
        if isinstance(key, list):
            number = record.get("image", 0)
            key = key[number] if number < len(key) else None
        if str(key) not in self._rows:
            return {}
        line, row = self._rows[str(key)]
        found: States = {}
        for name in names:
            alike = self._alike.get(same_name(name), [])
            for column in alike:
                if len(alike) > 1:
                    raise UserError(f"{self.where}: columns {' and '.join(alike)} are one label: keep one of them")
                cell = row[column]
                blank = cell.casefold() == "nan"  # as pandas writes what it does not know
                found[name] = None if blank else label_value(cell, f"{self.where}, line {line}", column)
        return found

    def label(self, records: Sequence[Record], names: Sequence[str]) -> tuple[list[States], dict[str, Any]]:
        """The states of all studies, and what was found: counts of every state by label, and names that are not there.

        Raises:
            UserError: no study is labelled, or no label of `names` is named.
        """
        labels = [self.of(record, names) for record in records]
        known = self._known(records)
        there = {same_name(name): name for name in known}
        if known and not any(same_name(name) in there for name in names):
            raise UserError(
                f"--labels-from: no label of the set is named in {self._told()}: {names[0]!r}{_near(names[0], known)}"
            )
        if not any(labels):
            raise UserError(f"--labels-from: {self._lack(records)}")
        asked = {same_name(name) for name in names}
        free = [name for name in known if same_name(name) not in asked]
        rows = {}
        for name in names:
            states = [row.get(name) for row in labels if row]
            row: dict[str, Any] = {"as": there.get(same_name(name))}
            row |= {word: sum(state == value for state in states) for value, word in _COUNTED.items()}
            if row["as"] is None:
                row["reason"] = f"not named in {self._told()}{_near(name, free)}"
            rows[name] = row
        labelled = sum(map(bool, labels))
        told = {"from": self.where, "sha256": self._sha256, "studies": labelled, "without": len(labels) - labelled}
        return labels, told | {"labels": rows}

    def _told(self) -> str:
        return f"field {self.where!r}" if self._rows is None else self.where

    def _known(self, records: Iterable[Record]) -> list[str]:
        if self._rows is not None:
            return self._columns
        fields = (record.get(self.where) for record in records)
        return list(dict.fromkeys(str(name) for field in fields if isinstance(field, dict | list) for name in field))

    def _lack(self, records: Sequence[Record]) -> str:
        """Why no study is labelled."""
        fields = {name for record in records for name, value in record.items() if isinstance(value, dict | list)}
        if self._rows is None:
            if self.where in fields:
                return f"field {self.where!r} is empty in all {len(records)} studies"
            near = get_close_matches(self.where, sorted(fields), n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"no study has a field {self.where!r} with labels{hint} (a table ends in .csv or .tsv)"
        if not any(self._key in record for record in records):
            return f"{self.where}: its first column {self._key!r} is no field of the studies: name it study_id"
        return f"{self.where}: column {self._key!r} has none of the {len(records)} studies"


def _near(name: str, known: Sequence[str]) -> str:
    """A hint at the nearest of the names; not at all of them, as what a field lists may be anything."""
    spelled = {same_name(other): other for other in known}
    near = get_close_matches(same_name(name), spelled, n=1)
    return f"; did you mean {spelled[near[0]]!r}?" if near else ""


def lines_of_labels(told: dict[str, Any]) -> list[str]:
    """What `LabelsFrom.label` found, as lines for people: only what the table of metrics does not show."""
    lines = [f"labels from {told['from']}: {told['studies']} studies, {told['without']} without"]
    for name, row in told["labels"].items():
        if "reason" in row:
            lines.append(f"  {name}: {row['reason']}")
        elif row["uncertain"]:
            lines.append(f"  {name}: {row['uncertain']} uncertain, left out")
    return lines
