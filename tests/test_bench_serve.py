"""The load on the service: what is counted, what it comes to; and the service as a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
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
    return {"clients": {"1": {"p50_ms": p50}, "16": {"per_second": per_second}}}


def test_ratios_are_medians_of_pairs() -> None:
    runs = {"medclip-lab": [run(30, 12), run(90, 14), run(20, 13)], "fastapi": [run(10, 0), run(10, 0), run(10, 0)]}
    bounded = {"clients": {"64": {"p50_ms": 100.0, "p99_ms": 250.0, "answered": 9, "statuses": {"200": 9, "429": 5}}}}
    assert ratios(runs, 10.0, bounded) == {
        "throughput_16_over_fastapi": 3.0,
        "added_ms_at_1": 3.0,
        "p99_over_p50_at_64_bounded": 2.5,
        "turned_away_at_64_bounded": 5,
        "unanswered_at_64_bounded": 0,
    }


@pytest.mark.parametrize(
    ("options", "told"), [({"only": ["flask"]}, "flask"), ({"repeats": 0}, "repeats"), ({"seconds": 0}, "seconds")]
)
def test_mistakes(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        bench_serve(**options)  # type: ignore[arg-type]


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
    assert sum(line.get("route") == "/v1/classify" for line in lines) == len(load.latencies)
    assert out == ""
