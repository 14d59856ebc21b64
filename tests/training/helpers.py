"""Runs in processes of their own: killed at a chosen moment, or several as the ranks of one run.

They are forked from a server that has imported everything once; to start Python anew for each would take minutes.
"""

import contextlib
import multiprocessing as mp
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from medclip_lab.errors import StartAgainError, UserError
from medclip_lab.training.run import WEIGHTS, RunConfig, train

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.helpers", "open_clip", "medclip_lab.data.pipeline"])
TIMEOUT = 180.0


def start(config: RunConfig, before: Callable[..., None] | None = None, *arguments: Any) -> BaseProcess:
    """One process that trains; `before` is called in it first, with `arguments`."""
    return _start(0, 1, 0, config, before, arguments, None)


def on_ranks(
    world: int,
    config: RunConfig | list[RunConfig],
    before: Callable[..., None] | None = None,
    *arguments: Any,
) -> list[tuple[int | None, str]]:
    """Train on so many ranks; their exit codes, and what stopped them. A list of configs gives each rank its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configs = config if isinstance(config, list) else [config] * world
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
    ranks = [_start(rank, world, port, configs[rank], before, arguments, pipes[rank][1]) for rank in range(world)]
    answers = []
    for (receiving, sending), process in zip(pipes, ranks, strict=True):
        sending.close()
        process.join(TIMEOUT)
        if process.is_alive():
            for other in ranks:
                other.kill()
            raise AssertionError(f"{world} ranks hang")
        told = ""
        with contextlib.suppress(EOFError):
            told = receiving.recv() if receiving.poll() else ""
        answers.append((process.exitcode, told))
    return answers


def _start(*arguments: Any) -> BaseProcess:
    process = CONTEXT.Process(target=_train, args=arguments)
    process.start()
    return process


def _train(
    rank: int,
    world: int,
    port: int,
    config: RunConfig,
    before: Callable[..., None] | None,
    arguments: tuple[Any, ...],
    told: Any,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if before is not None:
        before(*arguments)
    code = 0
    try:
        train(config)
    except (UserError, StartAgainError) as error:
        code = 75 if isinstance(error, StartAgainError) else 2
        if told is not None:
            told.send(str(error))
    except BaseException:
        code = 1
        if told is not None:
            told.send(traceback.format_exc())
    sys.stderr.flush()
    os._exit(code)  # as a launcher would end a rank: without waiting for threads


def weights(run: Path) -> dict[str, Tensor]:
    """What a finished run exports."""
    return load_file(run / WEIGHTS)


def off(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest relative difference of two models' tensors, each by its norm."""
    assert first.keys() == second.keys()
    return max(
        float((first[n] - second[n]).norm() / second[n].norm().clamp_min(1e-6)) for n in first if second[n].numel()
    )


def at_batch(number: int, what: int, rank: int = 0) -> None:
    """In this process: send the signal `what` to the process itself when its `rank` makes the batch of a step."""
    from medclip_lab.data.pipeline import BatchStream

    original = BatchStream.batch

    def batch(self: BatchStream, rows: Any, step: int, readers: Any) -> Any:
        if self.training and step == number and self.rank == rank:
            os.kill(os.getpid(), what)
        return original(self, rows, step, readers)

    BatchStream.batch = batch  # type: ignore[method-assign]


EVENTS = ("batch", "save", "fsync", "described", "write_json", "rename", "rmtree")
"""Moments at which `die_at` can kill: all but the first lie within the writing of a checkpoint."""


def die_at(event: str, turn: int) -> None:
    """In this process: SIGKILL to itself when `event` begins for the `turn`-th time."""
    from medclip_lab.data.pipeline import BatchStream
    from medclip_lab.training import checkpoint_files

    count = 0

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == turn:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    homes: dict[str, Any] = {"batch": BatchStream, "fsync": os, "rename": Path, "rmtree": shutil}
    home = homes.get(event, checkpoint_files)
    setattr(home, event, deadly(getattr(home, event)))
