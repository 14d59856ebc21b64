"""How a service stops: whoever is connected gets the answer under way and is told to close, then the door shuts."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from medclip_lab.serving.house import House

SECONDS = 2.0
"""For clients that send their next request on an open connection, and hear with its answer that it was the last."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def leaving(house: House) -> Iterator[None]:
    """While the block runs, the first signal to stop is passed on to uvicorn when no connection is left, or in SECONDS.

    uvicorn closes idle connections at once: a request that is on its way at that moment meets a reset. A second signal
    is passed on at once.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    server = getattr(handlers[signal.SIGTERM], "__self__", None)
    # Another server, or a test's client, knows how to stop by itself.
    if threading.current_thread() is not threading.main_thread() or not isinstance(server, uvicorn.Server):
        yield
        return
    loop = asyncio.get_running_loop()

    async def leave(number: int) -> None:
        until = loop.time() + SECONDS
        while server.server_state.connections and loop.time() < until:
            await asyncio.sleep(0.02)
        server.handle_exit(number, None)

    def hear(number: int, frame: FrameType | None) -> None:
        if house.leaving:
            server.handle_exit(number, frame)
        else:
            house.leaving = True
            loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(leave(number))))

    tasks: list[asyncio.Task[None]] = []
    for number in SIGNALS:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
