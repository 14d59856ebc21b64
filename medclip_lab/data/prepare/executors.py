"""Who makes the shards: this process, a pool of processes, or a Ray cluster; outcomes are the same, in any order."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any

from medclip_lab.data.prepare import job as jobs_module
from medclip_lab.data.prepare.job import Job, Outcome, make_shard
from medclip_lab.errors import UserError

EXECUTORS = ("processes", "ray")


def outcomes(jobs: Sequence[Job], executor: str, workers: int) -> Generator[Outcome]:
    """Run all jobs; whatever ends this early also ends those that run, and nothing stays half-written.

    Raises:
        UserError: what `make_shard` raises; a worker process that died; no Ray.
    """
    if executor == "ray":
        return _on_ray(jobs)
    workers = min(workers, len(jobs))
    return _in_processes(jobs, workers) if workers > 1 else (make_shard(job) for job in jobs)


def _in_processes(jobs: Sequence[Job], workers: int) -> Generator[Outcome]:
    context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads and devices are in use here
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(stop,))
    pending: set[Future[Outcome]] = set()
    try:
        for job in jobs:
            pending.add(_submit(pool, job))
            if len(pending) >= 2 * workers:  # the next job of each worker is there before it asks
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, most likely for want of memory: call it again with fewer --workers, it goes on"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, job: Job) -> Future[Outcome]:
    """Submit with SIGINT blocked: a worker that starts now inherits that, so that Ctrl-C is left to this process."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return pool.submit(make_shard, job)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(make_shard, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(stop: Event) -> None:
    jobs_module.stop = stop
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def _on_ray(jobs: Sequence[Job]) -> Generator[Outcome]:
    """On the cluster that RAY_ADDRESS names, else one of this machine; all its nodes must see the source and `out`."""
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install 'medclip_lab[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would call home
        ray.init(log_to_driver=False, configure_logging=False)
    remote = ray.remote(make_shard)
    at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: list[Any] = []
    try:
        for job in jobs:
            pending.append(remote.remote(job))
            if len(pending) >= at_once:
                done, pending = ray.wait(pending)
                yield from _results(ray, done)
        while pending:
            done, pending = ray.wait(pending)
            yield from _results(ray, done)
    finally:
        for running in pending:
            ray.cancel(running)
        if ours:
            ray.shutdown()


def _results(ray: Any, done: list[Any]) -> list[Outcome]:
    try:
        found: list[Outcome] = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return found
