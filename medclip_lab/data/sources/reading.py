"""A source read in this process, without shards."""

from collections.abc import Iterator

from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.sample import Sample, make_key
from medclip_lab.data.sources.base import BadStudyError, Source


def read_all(source: Source, quarantine: Quarantine | None = None) -> Iterator[Sample]:
    """Its usable studies; the rest goes to `quarantine`, by default one with the usual ceiling."""
    records = source.records()
    listed = quarantine if quarantine is not None else Quarantine(len(records))
    for record in records:
        key = make_key(record.study_id)

        def note(cause: str, reason: str, counted: bool = False, key: str = key) -> None:
            (listed.add if counted else listed.note)("", key, cause, reason)

        try:
            yield source.read(record, note)
        except BadStudyError as error:
            note(error.cause, error.reason, counted=True)
