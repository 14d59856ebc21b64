"""open_clip's own loader, as it has to be opened beside today's webdataset."""

import functools
from typing import Any


@functools.cache
def open_clip_data() -> Any:
    """The module `open_clip_train.data`.

    webdataset 0.2.90 and newer end a shard with an empty sample, at which open_clip 3.3 stops (its issue 935).
    """
    from open_clip_train import data

    expand = data.tar_file_expander
    data.tar_file_expander = lambda *given, **named: (member for member in expand(*given, **named) if member)
    return data
