"""Our batches out of plain webdataset: what an order that is known in advance and can be resumed costs beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset as wds

from medclip_lab.data.order import Place, Row
from medclip_lab.data.pipeline import Batch, BatchStream
from medclip_lab.data.reader import Reader, Study


class PlainStream(BatchStream):
    """As BatchStream, but for where studies come from: webdataset's shard list, tar reader and shuffle buffer."""

    def __iter__(self) -> Iterator[Batch]:
        self._plain = iter(_studies(Path(self.config.sources["bench"].shards), self.config.shuffle_size, self.seed))
        rows = [Row(number, "bench", Place(0, 0)) for number in range(self.config.batch_size)]
        for step in range(self.steps):
            yield self.batch(rows, step, {})

    def _studies(self, row: Row, step: int, readers: dict[str, Reader]) -> Iterator[Study]:  # noqa: ARG002 - no reader
        yield next(self._plain)


def _studies(folder: Path, window: int, seed: int) -> Iterator[Study]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = wds.DataPipeline(
        wds.SimpleShardList(urls, seed=seed), wds.tarfile_to_samples(), wds.shuffle(window, initial=window, seed=seed)
    )
    for number, sample in enumerate(samples):
        members: dict[str, Any] = {name: data for name, data in sample.items() if not name.startswith("__")}
        record = json.loads(members.pop("json"))
        yield Study(sample["__key__"], sample["__url__"], number, record, list(members.items()))
