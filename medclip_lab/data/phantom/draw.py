"""One study drawn: positioning, anatomy, findings, devices, then what the machine makes of it."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_lab.data.findings import SUPPORT_DEVICES
from medclip_lab.data.phantom.anatomy import Body, Frontal
from medclip_lab.data.phantom.canvas import Box, Canvas, Field, blur
from medclip_lab.data.phantom.case import Case
from medclip_lab.data.phantom.devices import draw_devices, draw_devices_lateral, faint_line
from medclip_lab.data.phantom.findings import draw_bones, draw_findings, shape_of, silhouettes
from medclip_lab.data.phantom.lateral import Lateral

Picture = tuple[NDArray[np.uint8], dict[str, list[Box]]]


def draw_frontal(case: Case, body: Body, rng: np.random.Generator, size: int) -> Picture:
    """The frontal view of a case, uint8 [size, size], and the boxes of what was drawn."""
    supine = case.view == "AP"
    canvas = _position(rng, size, 1.09)
    rotation = float(rng.normal(0, 0.5))
    scene = Frontal(canvas, body, shape_of(case.findings), supine, rotation)
    regions = draw_findings(scene, case.findings)
    regions |= silhouettes(scene, case.findings)
    draw_bones(scene, case.findings)
    devices = case.findings[SUPPORT_DEVICES]
    if case.devices:
        metal, regions[SUPPORT_DEVICES] = draw_devices(canvas, case.devices, scene.shape.shift, scene.dome_heights()[1])
        scene.dense += metal
    elif devices.present:
        metal, regions[SUPPORT_DEVICES] = faint_line(canvas, devices.side, devices.nonce)
        scene.dense += metal
    return _expose(scene.image(rng), rng, supine), regions


def draw_lateral(case: Case, body: Body, rng: np.random.Generator, size: int) -> Picture:
    """The side view of a case, uint8 [size, size], and the boxes of what shows in it."""
    canvas = _position(rng, size, 1.08)
    scene = Lateral(canvas, body, case.findings)
    regions = scene.draw()
    if case.devices:
        metal, boxes = draw_devices_lateral(canvas, case.devices)
        scene.dense += metal
        if boxes:
            regions[SUPPORT_DEVICES] = boxes
    return _expose(scene.image(rng), rng, False), regions


def encode(picture: NDArray[np.uint8]) -> bytes:
    """As an 8-bit greyscale PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def _position(rng: np.random.Generator, size: int, zoom: float) -> Canvas:
    shift = (float(rng.normal(0, 0.025)), float(rng.normal(0.01, 0.025)))
    return Canvas(size, float(rng.normal(zoom, 0.035)), shift, float(rng.normal(0, 0.025)))


def _expose(attenuation: Field, rng: np.random.Generator, supine: bool) -> NDArray[np.uint8]:
    """Scatter, exposure, noise and collimation."""
    size = attenuation.shape[0]
    image = Image.fromarray(attenuation)
    small = image.resize((max(2, size // 8),) * 2, Image.Resampling.BOX)
    scatter = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    share = np.float32(rng.uniform(0.04, 0.14) + 0.06 * supine)
    image_ = (1 - share) * attenuation + share * scatter
    image_ = blur(image_, float(rng.uniform(0.02, 0.16)))
    low, high = rng.normal(0.02, 0.02), rng.normal(0.93, 0.035)
    image_ = np.clip((image_ - np.float32(low)) * np.float32(1 / (high - low)), 0, 1.05)
    image_ = image_ ** np.float32(np.exp(rng.normal(0.0, 0.10)))
    grain = np.float32(rng.uniform(0.006, 0.020) + 0.004 * supine)
    image_ = image_ + grain * rng.standard_normal((size, size), dtype=np.float32)
    if rng.random() < 0.5:  # the collimator leaves a dark border on some sides
        top, bottom, left, right = (rng.random(4) < 0.4) * rng.uniform(0.005, 0.035, 4) * size
        image_[: round(top)] *= np.float32(0.1)
        image_[size - round(bottom) :] *= np.float32(0.1)
        image_[:, : round(left)] *= np.float32(0.1)
        image_[:, size - round(right) :] *= np.float32(0.1)
    return np.asarray(np.clip(image_ * 255 + 0.5, 0, 255), dtype=np.uint8)
