"""Figures of several processes: prometheus_client decides at its import how it keeps them, so not in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

from medclip_lab.serving.metrics import SHARED

CODE = """
import json, os
from medclip_lab.serving.metrics import Metrics, forget_dead

first = os.fork()
if not first:
    Metrics(lambda: 7, lambda: 5).now()
    os._exit(0)
os.waitpid(first, 0)
own = Metrics(lambda: 2, lambda: 0)
summed = own.page().decode()
forget_dead()
print(json.dumps([summed, own.page().decode()]))
"""


def test_what_is_inside_is_summed_over_processes_that_live(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | {SHARED: str(tmp_path)}, stdout=subprocess.PIPE, check=True
    )
    summed, alone = json.loads(said.stdout)  # of both; of the one that lives, once somebody has looked
    assert "medclip_requests_inside 9.0" in summed
    assert "medclip_inputs_waiting 5.0" in summed
    assert "medclip_requests_inside 2.0" in alone
    assert "medclip_inputs_waiting 0.0" in alone
