"""Bad data is counted by cause and listed, never dropped in silence; past a ceiling the run stops."""

import json
from collections import Counter
from pathlib import Path

from medclip_lab.errors import UserError


class Quarantine:
    """Counts what could not be used and lists it in a JSONL file with shard, key and reason.

    Args:
        total: number of samples the ceiling refers to.
        ceiling: largest share of `total` that may be bad; one bad sample is always allowed.
        path: the list; appended to a line at a time, so that several loader processes may share it.
    """

    def __init__(self, total: int, ceiling: float = 0.01, path: Path | None = None) -> None:
        self.total = total
        self.ceiling = ceiling
        self.path = path
        self.causes: Counter[str] = Counter()
        self._listed: set[tuple[str, str, str]] = set()

    def add(self, shard: str, key: str, cause: str, reason: str, count: int = 1) -> None:
        """Count and list a bad sample, once however often it is read.

        Raises:
            UserError: the ceiling is passed.
        """
        if not self.note(shard, key, cause, reason):
            return
        self.causes[cause] += count
        bad = sum(self.causes.values())
        if bad > max(1, int(self.ceiling * self.total)):
            where = f", listed in {self.path}" if self.path else ""
            causes = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())
            raise UserError(
                f"{bad} of {self.total} samples are unusable ({causes}), more than the ceiling of "
                f"{self.ceiling:.1%}{where}: mend the data or raise max_bad"
            )

    def note(self, shard: str, key: str, cause: str, reason: str) -> bool:
        """List without counting; False if it was listed before."""
        if (shard, key, cause) in self._listed:
            return False
        self._listed.add((shard, key, cause))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"shard": shard, "key": key, "cause": cause, "reason": reason}) + "\n")
        return True

    def summary(self) -> str:
        """One line for people, empty if nothing was bad."""
        if not self.causes:
            return ""
        causes = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())
        return f"{sum(self.causes.values())} of {self.total} samples unusable: {causes}"
