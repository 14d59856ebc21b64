"""Synthetic chest radiographs with reports, drawn by our own code: data that anyone may have and pass on.

They are for trying, testing and teaching: a run on them shows that the whole path works and what its numbers look
like, and says nothing about patients. Labels are those of the report, `extra["truth"]` is what was drawn; the two
differ where a report hedges or overlooks something. A report states "Lung Opacity" where it uses the word or calls the
lungs clear, so also with a pneumonia or an edema described as opacity; the truth counts every consolidation and
pneumonia as one.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from medclip_lab.data.phantom.study import make_patients, studies_of
from medclip_lab.errors import UserError

if TYPE_CHECKING:
    from medclip_lab.data.shards import Sample

__all__ = ["phantom_samples"]

_CHUNK = 24  # patients in a task: about 0.3 s of work


def phantom_samples(studies: int, seed: int = 0, size: int = 128, workers: int = 1) -> "Iterator[Sample]":
    """Draw and describe `studies` studies, in a fixed order, patient by patient.

    A study depends on the seed, its patient and the size alone: more studies go on where fewer end (the last patient of
    the fewer may then have more), and the number of workers changes nothing.

    Args:
        studies: how many studies (one or two images each) to make.
        seed: another seed gives other patients, with other identifiers.
        size: height and width of the images in pixels; thin things need about 96.
        workers: processes to draw in; more than one are spawned, so a script that asks for them needs the usual
            `if __name__ == "__main__":`.

    Raises:
        UserError: studies or workers below 1, a size below 32, a negative seed.
    """
    if studies < 1:
        raise UserError(f"phantom: studies={studies}, at least 1 is needed")
    if size < 32:
        raise UserError(f"phantom: size={size} pixels, at least 32 are needed")
    if seed < 0:
        raise UserError(f"phantom: seed={seed}, 0 or more is needed")
    if workers < 1:
        raise UserError(f"phantom: workers={workers}, at least 1 is needed")
    return _samples(studies, seed, size, workers)  # a generator of its own, so that mistakes show at the call


def _samples(studies: int, seed: int, size: int, workers: int) -> "Iterator[Sample]":
    from medclip_lab.data.shards import Sample  # here, as it imports torch, which the workers can do without

    for made in _made(studies, seed, size, workers):
        yield from (Sample(**fields) for fields in made)


def _made(studies: int, seed: int, size: int, workers: int) -> Iterator[list[dict[str, Any]]]:
    chunks = _chunks(studies, seed)
    if workers == 1:
        yield from (make_patients(tasks, seed, size) for tasks in chunks)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        pending: deque[Future[list[dict[str, Any]]]] = deque()
        for tasks in chunks:
            pending.append(pool.submit(make_patients, tasks, seed, size))
            if len(pending) > 3 * workers:  # never far ahead of who consumes them
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(studies: int, seed: int) -> Iterator[list[tuple[int, int, int]]]:
    """Tasks for `make_patients`, together `studies` studies."""
    patient, first = 0, 0
    while first < studies:
        tasks: list[tuple[int, int, int]] = []
        while len(tasks) < _CHUNK and first < studies:
            count = min(studies_of(seed, patient), studies - first)
            tasks.append((patient, first, count))
            patient, first = patient + 1, first + count
        yield tasks
