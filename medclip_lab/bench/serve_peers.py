"""The same classifier behind plain FastAPI, without batches, and behind LitServe, with them: to stand beside ours.

Run as `python -m medclip_lab.bench.serve_peers fastapi|litserve BUNDLE PORT MAX_BATCH MAX_DELAY`; both take
{"data": base64} and decode, resize and score as our service does.
"""

import base64
import sys
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


def serve_litserve(bundle: Path, port: int, max_batch: int, max_delay: float) -> None:
    """As LitServe's documentation has it: one worker, its batching on."""
    import litserve

    class Api(litserve.LitAPI):  # type: ignore[misc]
        def setup(self, device: str) -> None:  # noqa: ARG002 - named by LitServe
            self.bare = Bare(bundle)

        def decode_request(self, request: dict[str, Any]) -> Any:
            return self.bare.pixels(request["data"])

        def batch(self, inputs: list[Any]) -> list[Any]:
            return inputs

        def predict(self, x: list[Any]) -> list[dict[str, float]]:
            return self.bare.scores(x)

        def unbatch(self, output: list[dict[str, float]]) -> list[dict[str, float]]:
            return output

        def encode_response(self, output: dict[str, float]) -> dict[str, float]:
            return output

    api = Api(max_batch_size=max_batch, batch_timeout=max_delay, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    _, side, folder, number, batch, delay = sys.argv
    if side == "fastapi":
        serve_fastapi(Path(folder), int(number))
    else:
        serve_litserve(Path(folder), int(number), int(batch), float(delay))
