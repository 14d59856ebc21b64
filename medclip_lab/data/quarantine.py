"""Bad data is counted by cause and listed, never dropped in silence; past a ceiling the run stops."""

import json
import math
from collections import Counter
from pathlib import Path

from medclip_lab.errors import UserError
from medclip_lab.files import read_lines


class Quarantine:
    """Counts what could not be used and lists it in a JSONL file with shard, key and reason.

    Args:
        total: number of samples the ceiling refers to.
        ceiling: largest share of `total` that may be bad; one bad sample is always allowed.
        path: the list; appended to a line at a time, so that several loader processes may share it.
        source: stands in every line, if there are several.

    Attributes:
        share: of `total` that this process reads; the ceiling is that of its share.
        seen: samples that were read so far. In later epochs a process meets what others had before.
    """

    def __init__(self, total: int, ceiling: float = 0.01, path: Path | None = None, source: str = "") -> None:
        self.total = total
        self.ceiling = ceiling
        self.path = path
        self.source = source
        self.share = 1.0
        self.seen = 0
        self.causes: Counter[str] = Counter()
        self._listed: set[tuple[str, str | int, str]] = set()

    def add(self, shard: str, key: str, cause: str, reason: str, number: int | None = None) -> None:
        """Count and list a bad sample, once however often it is read.

        Args:
            number: its place in the shard: keys are what the shard says, and may repeat.

        Raises:
            UserError: the ceiling is passed.
        """
        if not self.note(shard, key, cause, reason, number):
            return
        self.causes[cause] += 1
        bad = sum(self.causes.values())
        met = min(self.total, max(self.share * self.total, self.seen))
        allowed = self.ceiling * met
        if self.share < 1:
            allowed += 3 * math.sqrt(allowed)  # a part has its luck: three standard deviations of a Poisson count
        if bad > max(1, int(allowed)):
            of = f" of source {self.source}" if self.source else ""
            where = f", listed in {self.path}" if self.path else ""
            causes = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())
            raise UserError(
                f"{bad} of {round(met)} samples{of} are unusable ({causes}), more than the ceiling of "
                f"{self.ceiling:.1%}{where}: mend the data or raise max_bad"
            )

    def note(self, shard: str, key: str, cause: str, reason: str, number: int | None = None) -> bool:
        """List without counting; False if it was listed before."""
        sample = (shard, key if number is None else number, cause)
        if sample in self._listed:
            return False
        self._listed.add(sample)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                line = {"source": self.source} if self.source else {}
                file.write(json.dumps(line | {"shard": shard, "key": key, "cause": cause, "reason": reason}) + "\n")
        return True

    def summary(self) -> str:
        """One line for people, empty if nothing was bad."""
        if not self.causes:
            return ""
        causes = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common())
        return f"{sum(self.causes.values())} of {self.total} samples unusable: {causes}"


def listed(path: Path) -> dict[str, dict[str, int]]:
    """Source -> cause -> bad samples in a list that several processes wrote to, each sample once."""
    lines = read_lines(path)
    samples = dict.fromkeys((line.get("source", ""), line["cause"], line["shard"], line["key"]) for line in lines)
    counts: dict[str, Counter[str]] = {}
    for source, cause, _, _ in samples:
        counts.setdefault(source, Counter())[cause] += 1
    return {source: dict(causes.most_common()) for source, causes in counts.items()}
