"""Where studies come from: a file a data set, each a `base.Source`.

A source is a frozen dataclass. Its fields are what `medclip-lab prepare NAME` takes: those without a default by
position, the others as flags, explained by `metadata={"help": ...}`; the first line of its file says what it is. The
files are imported whenever the command line is built, so they import nothing heavy at their top.
"""

from importlib import import_module
from typing import Any

SOURCES = {
    "phantom": "medclip_lab.data.sources.phantom:Phantom",
    "nih-cxr14": "medclip_lab.data.sources.nih_cxr14:NihCxr14",
    "openi": "medclip_lab.data.sources.openi:OpenI",
    "csv": "medclip_lab.data.sources.csv_pairs:CsvPairs",
}
"""Name -> "module:class"."""


def source_class(name: str) -> type[Any]:
    """The class of a source that `SOURCES` names."""
    module, _, cls = SOURCES[name].partition(":")
    found: type[Any] = getattr(import_module(module), cls)
    return found
