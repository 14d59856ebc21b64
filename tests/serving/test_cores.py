"""The model's share of the cores is its share of the work."""

import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from medclip_lab.serving import cores
from medclip_lab.serving.cores import Cores, Decoders, apart


@pytest.mark.parametrize(
    ("number", "decode", "model", "share", "room"),
    [
        (2, 0.002, 0.002, 1, 1),
        (2, 0.002, 0.3, 2, 1),
        (2, 0.3, 0.002, 1, 2),
        (16, 0.002, 0.006, 12, 4),
        (1, 0.002, 0.3, 1, 1),
    ],
)
def test_share(
    monkeypatch: pytest.MonkeyPatch, number: int, decode: float, model: float, share: int, room: int
) -> None:
    """Four images that cost their decoder `decode` seconds each, after a quiet batch that cost `model` for each."""
    found, now, used = Cores(number), [0.0], []
    monkeypatch.setattr(cores.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(cores.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cores.torch, "set_num_threads", used.append)
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: 0)
    assert found.share() == number
    with found.alone(16):
        now[0] += 100  # the first batch, with all that a first time costs
    with found.alone(16):
        now[0] += 16 * model / number  # on all cores
    for _ in range(4):
        with found.decoding():
            now[0] += decode
    for _ in range(3):
        found.take(crowded=True)
        now[0] += 10  # however long it takes beside others
    assert found.share() == used[-1] == share
    assert found.room(crowded=True) == room
    found.take(crowded=False)
    assert used[-1] == found.room(crowded=False) == number  # nobody else needs a core
    assert Cores(number, decoders=9).room(crowded=True) == 9


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_runs_apart_leaves_no_thread_behind() -> None:
    """Of two teams on as many threads as cores each would sleep at its barriers."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    number = torch.get_num_threads()
    torch.set_num_threads(4)  # which starts threads of another pool
    before = threads()
    try:

        def work() -> int:
            torch.ones(2_000_000).sin_()
            return threads()

        assert apart(work) == before + 4
    finally:
        torch.set_num_threads(number)
    for _ in range(100):
        if threads() <= before:
            return
        time.sleep(0.05)
    pytest.fail("the team outlives its thread")


def test_so_many_decode_as_there_is_room_for() -> None:
    now, most, lock, room = 0, 0, threading.Lock(), 3
    order: list[int] = []

    def decode(number: int) -> int:
        nonlocal now, most
        with lock:
            order.append(number)
            now += 1
            most = max(most, now)
        time.sleep(0.005)
        with lock:
            now -= 1
        return -number

    decoders = Decoders(4, lambda: room)
    for expected in (3, 1, 2):
        room, most = expected, 0
        order.clear()
        assert list(decoders.map(decode, range(24))) == [-number for number in range(24)]
        assert most == expected
        assert max(abs(place - number) for place, number in enumerate(order)) < expected
    decoders.shutdown()
    with pytest.raises(RuntimeError, match="after the end"):
        decoders.submit(decode, 1)


def test_what_fails_fails_for_who_waits_and_the_end_leaves_nothing() -> None:
    def fail() -> None:
        raise ValueError("broken")

    go, kept = threading.Event(), []
    decoders = Decoders(3, lambda: 1)
    with pytest.raises(ValueError, match="broken"):
        decoders.submit(fail).result(10)
    first = decoders.submit(go.wait, 10)
    gone = decoders.submit(kept.append, 1)
    rest = [decoders.submit(kept.append, number) for number in range(2, 5)]
    assert gone.cancel()
    threading.Timer(0.05, go.set).start()
    decoders.shutdown()  # what was asked for before is done
    assert (first.result(), [one.result() for one in rest], sorted(kept)) == (True, [None] * 3, [2, 3, 4])
    busy = Decoders(1, lambda: 1)
    go.clear()
    first, left = busy.submit(go.wait, 10), busy.submit(kept.append, 9)
    threading.Timer(0.05, go.set).start()
    busy.shutdown(cancel_futures=True)
    assert (first.result(), left.cancelled(), 9 in kept) == (True, True, False)
    Decoders(1, lambda: 1).shutdown()  # nothing was ever decoded


def test_what_cannot_be_decoded_says_nothing_of_the_time() -> None:
    found = Cores(2)
    with pytest.raises(ValueError, match="broken"), found.decoding():
        raise ValueError("broken")
    assert found._decode == 0.0
    with found.decoding():
        sum(range(1000))
    assert found._decode > 0.0
