"""Towers that ONNX Runtime runs on the CPU, in the place of a bundle's own."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder, read_json, sha256
from medclip_lab.inference.encoder import Encoder
from medclip_lab.models.dual_encoder import DualEncoder

FORMAT = "medclip-lab-onnx/1"
MANIFEST = "medclip_lab.json"
INPUTS = {"image": "pixels", "text": "ids"}
"""Name of the only input of each tower's graph."""


def with_onnx(encoder: Encoder, folder: str | Path) -> Encoder:
    """The same bundle, its towers run by ONNX Runtime from what `export --to onnx` wrote.

    Prompts of label sets are still encoded by the bundle's own text tower, in float32.

    Raises:
        UserError: ONNX Runtime is not installed, no such folder, one of another bundle, a file that was changed, a
            bundle that is not on the CPU.
    """
    if find_spec("onnxruntime") is None:
        raise UserError("onnxruntime is not installed: pip install 'medclip_lab[onnx]'")
    path = existing_folder(folder, "onnx")
    facts = read_json(path / MANIFEST, "onnx")
    if facts.get("format") != FORMAT:
        raise UserError(f"onnx: {path / MANIFEST} has format {facts.get('format')!r}, not {FORMAT!r}")
    if facts["bundle"] != encoder.fingerprint:
        raise UserError(f"onnx: {path} was exported from another bundle: export this one with --to onnx")
    for name, expected in facts["files"].items():
        if not (path / name).is_file() or sha256(path / name) != expected:
            raise UserError(f"onnx: {path / name} is missing or was changed after export: export again")
    if encoder.model.mean.device.type != "cpu":
        raise UserError("onnx: ONNX Runtime serves the CPU here, and the bundle is on a GPU: take --device cpu")
    towers: Any = OnnxTowers(encoder.model, path)
    return Encoder(encoder.folder, encoder.manifest, towers, encoder.tokenizer, encoder.preprocess.config)


def session(path: Path) -> Any:
    """A graph, ready to run on as many threads as torch takes.

    Raises:
        UserError: ONNX Runtime cannot read it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while they wait for each other take the cores from whoever decodes the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors: it warns of what its own optimiser does
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"onnx: ONNX Runtime cannot run {path}: {first}") from None


class OnnxTowers(nn.Module):
    """A `DualEncoder` whose features come from ONNX Runtime; all else of it is the bundle's own."""

    def __init__(self, dual: DualEncoder, folder: Path) -> None:
        super().__init__()
        self.dual = dual
        self._sessions = {name: session(folder / f"{name}.onnx") for name in INPUTS}

    @property
    def model(self) -> Any:
        return self.dual.model

    @property
    def channels(self) -> int:
        return self.dual.channels

    @property
    def mean(self) -> Tensor:
        return self.dual.mean

    @property
    def std(self) -> Tensor:
        return self.dual.std

    @property
    def logit_scale(self) -> Tensor:
        return self.dual.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self.dual.logit_bias

    def normalised(self, pixels: Tensor) -> Tensor:
        """As the bundle's own tower sees them, for what looks into it."""
        return self.dual.normalised(pixels)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[N, D] unit norm from [N, 1 or 3, H, W], uint8 or float in [0, 1]."""
        pixels = self.dual.fitted(pixels)
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        return self._run("image", pixels.expand(-1, self.channels, -1, -1).float())

    def encode_text(self, ids: Tensor) -> Tensor:
        """[M, D] unit norm from int64 [M, L], L being the context."""
        return self._run("text", ids)

    def _run(self, name: str, inputs: Tensor) -> Tensor:
        rows = np.ascontiguousarray(inputs.numpy())
        return torch.from_numpy(self._sessions[name].run(None, {INPUTS[name]: rows})[0])
