"""The load on the service: what is counted, what it comes to; and the service as a process of its own."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from medclip_lab.bench.serve import bench_serve, image, make_bundle, ratios
from medclip_lab.bench.serve_load import send
from medclip_lab.errors import UserError


def run(per_second: float, p50: float) -> dict[str, object]:
    return {"clients": {"1": {"p50_ms": p50}, "16": {"per_second": per_second, "cpu_ms": 1000 / per_second}}}


def test_ratios_are_medians_of_pairs() -> None:
    runs = {
        "medclip-lab": [run(30, 12), run(90, 14), run(20, 13)],
        "medclip-lab-onnx": [run(40, 11)] * 3,
        "fastapi": [run(10, 0), run(10, 0), run(10, 0)],
    }
    bounded = {"clients": {"64": {"p50_ms": 100.0, "p99_ms": 250.0, "answered": 9, "statuses": {"200": 9, "429": 5}}}}
    assert ratios(runs, [10.0, 9.0, 10.0], bounded) == {
        "throughput_16_over_fastapi": 3.0,
        "cpu_a_request_16_over_fastapi": 0.33,
        "added_ms_at_1": 3.0,
        "throughput_16_over_fastapi_onnx": 4.0,
        "cpu_a_request_16_over_fastapi_onnx": 0.25,
        "added_ms_at_1_onnx": 1.0,
        "p99_over_p50_at_64_bounded": 2.5,
        "shares_at_64_bounded": {"200": 0.6429, "429": 0.3571},
        "unanswered_at_64_bounded": 0,
    }


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"only": ["flask"]}, "flask"),
        ({"repeats": 0}, "repeats"),
        ({"seconds": 0}, "seconds"),
        ({"minutes": 0}, "minutes"),
    ],
)
def test_mistakes(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        bench_serve(**options)  # type: ignore[arg-type]


def test_a_side_whose_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclip_lab.bench.serve.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(UserError, match="medclip-lab-onnx needs pip install onnxruntime, or name other sides"):
        bench_serve()


def test_what_a_client_counts() -> None:
    """Answers, refusals, connections that break and answers of no length, from a server that gives them in turn."""
    answers = [
        b'HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{"timings_ms": {"model": 2.5}}',
        b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\nConnection: close\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{}",  # and then it ends
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
    ]
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                seen.append(head + await reader.readexactly(3))
                number = (len(seen) - 1) % len(answers)
                writer.write(answers[number])
                if number in (1, 2):
                    break
        writer.close()

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        loop = asyncio.new_event_loop()
        loop.run_until_complete(asyncio.start_server(answer, sock=listening))
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        load = send(f"http://{address}/v1/classify", [b"[1]"], clients=1, seconds=0.5, warm_up=0.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
    assert seen[0].startswith(b"POST /v1/classify HTTP/1.1\r\nhost: " + address.encode())
    assert seen[0].endswith(b"content-type: application/json\r\ncontent-length: 3\r\n\r\n[1]")
    assert load.sent == len(seen)
    rounds = load.sent // len(answers)
    assert rounds > 2
    for status, share in ((200, 2), (429, 1), (0, 2)):
        assert share * rounds <= load.statuses[status] <= share * (rounds + 1)
    assert set(load.stages) == {"model"}
    assert set(load.stages["model"]) == {2.5}
    assert len(load.latencies) == load.statuses[200]


@pytest.mark.parametrize(("stolen", "attempt"), [([0.0], 1), ([0.4, 0.01], 2), ([0.4, 0.2, 0.1, 0.3, 0.0], 3)])
def test_the_load_that_was_disturbed_least_counts(
    stolen: list[float], attempt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medclip_lab.bench import serve
    from medclip_lab.bench.serve_load import Load

    now, taken, left = [0.0], [0.0], iter(stolen)

    def loaded(*_: object) -> Load:
        now[0] += 10.0
        taken[0] += 10.0 * next(left) * (os.cpu_count() or 1)
        return Load(seconds=10.0, sent=5)

    monkeypatch.setattr(serve, "send", loaded)
    monkeypatch.setattr(serve, "stolen_seconds", lambda: taken[0])
    monkeypatch.setattr(serve.time, "perf_counter", lambda: now[0])
    load = serve.measure("fastapi", "http://localhost", os.getpid(), [b"{}"], 1, 10.0)
    assert (load["attempt"], load["stolen"]) == (attempt, stolen[attempt - 1])


def test_growth_is_from_after_the_warm_up_to_the_end() -> None:
    from medclip_lab.bench.serve_mixed import growth

    memory = [10.0, 50.0] + [100.0] * 2 + [300.0] * 14 + [102.0] * 2
    told = growth(memory)
    assert told == {"memory_after_warm_up_mib": 100.0, "memory_at_end_mib": 102.0, "memory_growth": 0.02}


def test_a_tree_of_processes_is_counted_whole() -> None:
    from medclip_lab.bench.processes import cpu_seconds, resident_mib, tree

    busy = "x = b'x' * 2**26; sum(range(3 * 10**6)); print(flush=True); import time; time.sleep(60)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        processes = list(tree(parent.pid))
        assert len(processes) == 2
        assert resident_mib(parent.pid) > 64 + resident_mib(processes[1]) / 10
        assert cpu_seconds(parent.pid) >= cpu_seconds(processes[1]) > 0
        for process in processes[::-1]:
            os.kill(process, signal.SIGKILL)
    assert (list(tree(parent.pid)), resident_mib(parent.pid)) == ([], 0)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("litserve") is None, reason="with the other loads: extra test-serving")
def test_two_processes_serve_count_together_and_stop(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "medclip_lab", "serve", str(bundle), "--port", str(port), "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{base}/readyz", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
        import base64

        for _ in range(400):  # more lines than the pipe of a log that nobody reads takes
            urllib.request.urlopen(f"{base}/healthz", timeout=20).close()
        bodies = [json.dumps({"images": [{"data": base64.b64encode(image(0)).decode()}]}).encode()]
        load = send(f"{base}/v1/classify", bodies, clients=4, seconds=1.0, warm_up=0.0)
        assert set(load.statuses) == {200}
        assert {"decode", "queue", "model", "total"} <= set(load.summary()["stages_p50_ms"])
        line = 'medclip_requests_total{route="/v1/classify",status="200"} '
        for _ in range(50):  # an answer is counted once it has left
            page = urllib.request.urlopen(f"{base}/metrics").read().decode()
            counted = float(page.partition(line)[2].splitlines()[0])
            if counted == len(load.latencies):
                break
            time.sleep(0.1)
        assert counted == len(load.latencies)
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    lines = [json.loads(line) for line in err.splitlines()]
    ready = next(
        place for place, line in enumerate(lines) if (line.get("route"), line.get("status")) == ("/readyz", 200)
    )
    assert sum(line["event"] == "Application startup complete." for line in lines[:ready]) == 2
    assert sum(line.get("route") == "/v1/classify" for line in lines) == len(load.latencies)
    assert out == ""
