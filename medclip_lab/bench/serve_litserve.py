"""The same classifier behind LitServe, with its batching on: run as a module with BUNDLE PORT MAX_BATCH MAX_DELAY."""

import sys
from pathlib import Path
from typing import Any

import litserve

from medclip_lab.bench.serve_peers import Bare


class Api(litserve.LitAPI):  # type: ignore[misc]
    """As LitServe's documentation has it; its workers import this file, hence no class inside a function."""

    bundle: Path

    def setup(self, device: str) -> None:  # noqa: ARG002 - named by LitServe
        self.bare = Bare(self.bundle)

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


def main(bundle: Path, port: int, max_batch: int, max_delay: float) -> None:
    api = Api(max_batch_size=max_batch, batch_timeout=max_delay, api_path="/classify")
    api.bundle = bundle
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
