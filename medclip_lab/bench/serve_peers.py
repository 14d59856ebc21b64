"""The same classifier with nothing around it, and behind plain FastAPI without batches: to stand beside ours.

Run as `python -m medclip_lab.bench.serve_peers BUNDLE PORT`; it takes {"data": base64} and decodes, resizes and scores
as our service does. Without PORT it takes lines of base64 from its input and prints its median milliseconds.
"""

import base64
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from medclip_lab.data.decode import decode_image
from medclip_lab.data.preprocess import stack


class Bare:
    """A bundle's classifier with nothing around it."""

    def __init__(self, bundle: Path) -> None:
        from medclip_lab.inference.encoder import load

        self.encoder = load(bundle)
        self.classifier = self.encoder.zero_shot_classifier("chexpert14")

    def pixels(self, data: str) -> Any:
        return self.encoder.preprocess(decode_image(base64.b64decode(data), "jpg"))

    def scores(self, pixels: list[Any]) -> list[dict[str, float]]:
        import torch

        with torch.inference_mode():
            features = self.encoder.model.encode_image(stack(pixels)).numpy()
        rows = self.classifier.scores(features)
        return [dict(zip(self.classifier.names, map(float, row), strict=True)) for row in rows]


def serve_fastapi(bundle: Path, port: int) -> None:
    """As FastAPI's documentation has it for work that blocks: a plain function, on a pool of threads."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Body(BaseModel):
        data: str

    bare, app = Bare(bundle), FastAPI()

    def classify(body: Body) -> dict[str, float]:
        return bare.scores([bare.pixels(body.data)])[0]

    classify.__annotations__["body"] = Body
    app.post("/classify")(classify)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def latency(bundle: Path, images: list[str], number: int = 100) -> float:
    """Median milliseconds from an image in base64 to its scores, in a process that does nothing else."""
    bare, took = Bare(bundle), []
    for turn in range(number + 10):
        start = time.perf_counter()
        bare.scores([bare.pixels(images[turn % len(images)])])
        took.append(time.perf_counter() - start)
    return 1000 * statistics.median(took[10:])


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(latency(Path(sys.argv[1]), sys.stdin.read().split()))
    else:
        serve_fastapi(Path(sys.argv[1]), int(sys.argv[2]))
