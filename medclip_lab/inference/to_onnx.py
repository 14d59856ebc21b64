"""A bundle as ONNX: both towers apart, any number of rows at once, normalisation inside, features as ours.

`image.onnx`: "pixels", float32 [N, C, S, S] in [0, 1], to "features", float32 [N, D], unit norm. `text.onnx`: "ids",
int64 [N, L], padded to the context, to the same. `medclip_lab.json` says what comes before: size, resizing, window,
tokenizer.
"""

import logging
import shutil
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medclip_lab.data.tokenizer import FILES as TOKENIZER_FILES
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_folder, refuse_to_replace, sha256, write_json
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.inference.onnx_towers import FORMAT, INPUTS, MANIFEST, session
from medclip_lab.models.spec import quiet

Precision = Literal["float32", "int8"]
TOLERANCE = 1e-4
"""Largest difference of a feature that is let pass in float32."""
LEAST_COSINE = 0.9
"""Of a feature in int8 with its own in float32; what lies further off says something else."""
LEAST_SHARE = 0.5
"""Of an image tower's weights that int8 must reach to be worth its loss."""
BATCHES = (1, 2, 5)
"""Rows at once in the comparison; the graph is traced with three."""
TEXTS = (
    "Effusion.",
    "No pleural effusion is seen on the left.",
    "Normal heart size.",
    "The heart is enlarged. " * 40,
    "",
)


def to_onnx(bundle: str | Path, out: str | Path, command: str = "", precision: Precision = "float32") -> dict[str, Any]:
    """Write both towers of a bundle as ONNX to `out`, whole or not at all.

    ONNX Runtime runs what was written on random pixels and on texts of several lengths, in batches of several sizes,
    and its features are compared with the bundle's before the folder is kept.

    Args:
        precision: "int8" holds the weights of matrix products in 8 bits, a scale for each column, and makes 8 bits of
            what goes into them as it comes (dynamic quantisation). That scale is one for all rows of a batch, so a
            feature then depends a little on what else is in the batch.

    Returns:
        What stands in its `medclip_lab.json`.

    Raises:
        UserError: ONNX is not installed, a tower that torch cannot export, features that differ, int8 where it reaches
            too little of a tower.
    """
    if precision not in get_args(Precision):
        raise UserError(f"onnx: precision is one of {', '.join(get_args(Precision))}, got {precision!r}")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'medclip_lab[onnx]'")
    out = Path(out).expanduser()
    encoder = load(bundle, device="cpu")
    refuse_to_replace(out, MANIFEST, (FORMAT,), "folder for ONNX")
    facts: dict[str, Any] = {"format": FORMAT, "bundle": encoder.fingerprint, "precision": precision}
    with atomic_folder(out) as folder, torch.no_grad():
        for name, (tower, rows) in _towers(encoder).items():
            path = folder / f"{name}.onnx"
            _export(name, tower, rows[:3], path)
            expected = getattr(encoder.model, f"encode_{name}")(rows).numpy()  # not what was exported, by itself
            difference = float(np.max([np.abs(one - expected).max() for one in _run(name, path, rows)]))
            if not difference <= TOLERANCE:  # nor one that is no number
                raise UserError(
                    f"onnx: features of the {name} tower differ by {difference:.1e}, more than {TOLERANCE:g}"
                )
            known: dict[str, Any] = {"input": _facts(name, rows), "largest_difference": difference}
            if precision == "int8":
                share = _quantise(name, path)
                cosine = float(np.min([(one * expected).sum(1).min() for one in _run(name, path, rows)]))
                if not cosine >= LEAST_COSINE:
                    raise UserError(
                        f"onnx: int8 turns features of the {name} tower to a cosine of {cosine:.3f}: refused"
                    )
                known |= {"share_in_int8": round(share, 3), "least_cosine": cosine}
            facts[name] = known
        facts |= _around(encoder, folder) | {"command": command}
        facts["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, facts)
    return facts


def summary(facts: dict[str, Any]) -> str:
    """A line for people."""
    if facts["precision"] == "int8":
        cosines = ", ".join(f"{name} {facts[name]['least_cosine']:.4f}" for name in INPUTS)
        return f"two graphs in int8, least cosine with the bundle's features: {cosines}"
    largest = max(facts[name]["largest_difference"] for name in INPUTS)
    return f"two graphs, features within {largest:.0e} of the bundle's"


class _Tower(nn.Module):
    """Features as `DualEncoder` gives them: `torch.export` takes a module's forward."""

    def __init__(self, encoder: Encoder, name: str) -> None:
        super().__init__()
        self.dual: Any = encoder.model
        self.name = name

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.dual.towers[self.name](inputs)
        return features


def _towers(encoder: Encoder) -> dict[str, tuple[nn.Module, Tensor]]:
    """Each tower with rows to try it on."""
    size = encoder.preprocess.config.size
    pixels = torch.rand(max(BATCHES), encoder.model.channels, size, size, generator=torch.Generator().manual_seed(0))
    ids = encoder.tokenizer(list(TEXTS))
    return {"image": (_Tower(encoder, "image").eval(), pixels), "text": (_Tower(encoder, "text").eval(), ids)}


def _export(name: str, tower: nn.Module, rows: Tensor, path: Path) -> None:
    logging.disable(logging.CRITICAL)  # the exporter tells of its own insides; what matters is compared afterwards
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                tower,
                (rows,),
                dynamo=True,
                input_names=[INPUTS[name]],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("rows")},),
                verbose=False,
            )
    except Exception as error:  # the exporter and every operator in it have their own
        raise UserError(
            f"onnx: torch cannot export the {name} tower, {_kind(tower)}: {_reason(error)}; keep to open_clip, which "
            "opens the bundle"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    assert program is not None
    program.save(path)  # beside weights of more than 2 GB, in a file of their own


def _kind(tower: Any) -> str:
    towers = tower.dual.model
    part = towers.visual if tower.name == "image" else getattr(towers, "text", towers)
    return type(getattr(part, "trunk", getattr(part, "transformer", part))).__name__


def _reason(error: BaseException) -> str:
    """The first line of what began it: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _run(name: str, path: Path, rows: Tensor) -> Sequence[NDArray[np.float32]]:
    """Features of all rows, once for each size of batch."""
    runs = session(path)
    found = []
    for size in BATCHES:
        try:
            parts = [runs.run(None, {INPUTS[name]: part.numpy()})[0] for part in torch.split(rows, size)]
        except Exception as error:  # ONNX Runtime's own
            raise UserError(
                f"onnx: the graph of the {name} tower takes no {size} rows at once: {_reason(error)}"
            ) from None
        found.append(np.concatenate(parts))
    return found


def _quantise(name: str, path: Path) -> float:
    """Put int8 in place of a float32 graph; returns the share of the weights that now are."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = path.with_suffix(".float32")
    data = path.with_name(f"{path.name}.data")
    outside = data.exists()
    path.rename(whole)
    with quiet():
        quantize_dynamic(
            whole,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=outside,
        )
    whole.unlink()
    weights = onnx.load(path, load_external_data=False).graph.initializer
    numbers = [(int(np.prod(weight.dims)), weight.data_type == onnx.TensorProto.INT8) for weight in weights]
    share = sum(count for count, small in numbers if small) / max(sum(count for count, _ in numbers), 1)
    if name == "image" and share < LEAST_SHARE:
        raise UserError(
            f"onnx: int8 reaches {share:.0%} of the image tower's weights, for it leaves convolutions as they are: "
            "take --precision float32"
        )
    return share


def _facts(name: str, rows: Tensor) -> dict[str, Any]:
    return {"name": INPUTS[name], "dtype": str(rows.dtype).removeprefix("torch."), "shape": ["rows", *rows.shape[1:]]}


def _around(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """What a user of the graphs must know and do; the tokenizer's files go beside them."""
    files = [name for name in TOKENIZER_FILES if (encoder.folder / name).exists()]
    for name in files:
        shutil.copyfile(encoder.folder / name, folder / name)
    return {
        "preprocess": encoder.preprocess.config.record() | {"scale": "divide by 255; mean and std are in the graph"},
        "tokenizer": {
            "files": files,
            "open_clip": None if files else type(encoder.tokenizer).__name__,
            "context_length": int(encoder.tokenizer.context_length),
            "padding": "to the context",
        },
        "logit_scale": encoder.logit_scale,
        "logit_bias": encoder.logit_bias,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
    }
