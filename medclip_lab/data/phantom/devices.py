"""Tubes, lines and implants, in front and side views."""

import numpy as np

from medclip_lab.data.phantom.anatomy import SIDE
from medclip_lab.data.phantom.canvas import Box, Canvas, Field, Points, Stroke, curve, moved
from medclip_lab.data.phantom.case import Device


def draw_devices(canvas: Canvas, devices: tuple[Device, ...], shift: float, dome: float) -> tuple[Field, list[Box]]:
    """What the devices add to a frontal view, and the box of each; `shift` is that of the mediastinum."""
    strokes: list[Stroke] = []
    boxes: list[Box] = []
    for device in devices:
        drawn = _frontal(device, np.random.default_rng(device.nonce), shift, dome)
        strokes += drawn
        boxes.append(_box(canvas, drawn))
    return canvas.strokes(strokes) * np.float32(0.42), boxes


def draw_devices_lateral(canvas: Canvas, devices: tuple[Device, ...]) -> tuple[Field, list[Box]]:
    """The same for the side view, where only implants and the larger tubes are drawn."""
    strokes: list[Stroke] = []
    boxes: list[Box] = []
    for device in devices:
        drawn = _lateral(device, np.random.default_rng(device.nonce))
        if drawn:
            strokes += drawn
            boxes.append(_box(canvas, drawn))
    return canvas.strokes(strokes) * np.float32(0.42), boxes


def faint_line(canvas: Canvas, side: str, nonce: int) -> tuple[Field, list[Box]]:
    """Something thin over the chest that may be a catheter."""
    rng, sign = np.random.default_rng(nonce), SIDE[side]
    top = (sign * rng.uniform(0.3, 0.5), rng.uniform(-0.6, -0.4))
    stroke = Stroke(curve(top, (sign * 0.45, -0.2), (sign * rng.uniform(0.2, 0.5), 0.1)), 0.018, 0.6)
    return canvas.strokes([stroke]) * np.float32(0.30), [_box(canvas, [stroke])]


def _box(canvas: Canvas, strokes: list[Stroke]) -> Box:
    points = np.concatenate([canvas.picture(stroke.points) for stroke in strokes])
    low, high = np.clip(points.min(axis=0) - 0.01, 0, 0.98), np.clip(points.max(axis=0) + 0.01, 0.02, 1)
    return [round(float(value), 4) for value in (*low, *high)]


def _circle(x: float, y: float, radius: float, steps: int = 16) -> Points:
    turn = np.linspace(0, 2 * np.pi, steps)
    return np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], axis=1)


def _rounded(x: float, y: float, width: float, height: float) -> Points:
    turn = np.linspace(0, 2 * np.pi, 24)
    shape = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    shape = np.sign(shape) * np.abs(shape) ** 0.6
    return moved(shape * [width, height], x, y)


def _frontal(device: Device, rng: np.random.Generator, shift: float, dome: float) -> list[Stroke]:
    sign = SIDE[device.side]
    jitter = rng.uniform(-0.03, 0.03, 8)
    if device.kind == "endotracheal tube":
        tip = -0.36 + jitter[0]
        tube = curve((shift + jitter[1], -1.1), (shift, -0.7), (shift, tip))
        return [Stroke(moved(tube, -0.017, 0), 0.018, 0.85), Stroke(moved(tube, 0.017, 0), 0.018, 0.85)]
    if device.kind == "enteric tube":
        path = curve(
            (shift + 0.03, -1.1), (shift + 0.01, -0.2), (shift + 0.05, 0.3), (0.30 + jitter[0], dome + 0.22), steps=20
        )
        return [Stroke(path, 0.03, 0.65)]
    if device.kind == "central line":
        tip = (shift - 0.12 + jitter[0], -0.10 + jitter[1])
        if rng.random() < 0.5:  # from the neck
            path = curve((sign * 0.22, -1.0), (sign * 0.20, -0.55), (shift - 0.13, -0.45), tip)
        else:  # from the arm
            path = curve((sign * 0.95, -0.30), (sign * 0.60, -0.78), (sign * 0.05, -0.50), tip, steps=20)
        return [Stroke(path, 0.026, 0.72)]
    if device.kind == "port":
        x, y = sign * (0.42 + jitter[0]), -0.30 + jitter[1]
        path = curve((x, y - 0.05), (sign * 0.36, -0.78), (sign * 0.02, -0.55), (shift - 0.12, -0.08), steps=20)
        return [Stroke(_circle(x, y, 0.052), 0.03, 1.0), Stroke(path, 0.025, 0.7)]
    if device.kind == "pacemaker":
        x, y = sign * (0.50 + jitter[0]), -0.42 + jitter[1]
        strokes = [Stroke(_rounded(x, y, 0.105, 0.085), 0, 0.95, True)]
        for end in ((shift - 0.10, 0.16 + jitter[2]), (shift + 0.34 + jitter[3], 0.34 + jitter[4])):
            path = curve((x - sign * 0.08, y), (sign * 0.20, -0.72), (shift - 0.22, -0.10), end, steps=20)
            strokes += [Stroke(path, 0.025, 0.8), Stroke(path[-3:], 0.032, 1.0)]
        return strokes
    if device.kind == "sternal wires":
        strokes = []
        for number in range(int(rng.integers(5, 7))):
            y = -0.42 + 0.155 * number
            x = shift + jitter[number]
            loop = _rounded(x, y, 0.040, 0.022)
            strokes += [Stroke(loop, 0.021, 0.95), Stroke(np.array([(x, y), (x + 0.02, y + 0.04)]), 0.02, 0.95)]
        return strokes
    if device.kind == "chest tube":
        top = (sign * (0.34 + jitter[0]), -0.48 + jitter[1])
        path = curve((sign * 1.0, 0.36 + jitter[2]), (sign * 0.62, 0.22), (sign * 0.50, -0.10), top, steps=20)
        return [Stroke(moved(path, -0.020, 0), 0.016, 0.8), Stroke(moved(path, 0.020, 0), 0.016, 0.8)]
    assert device.kind == "ecg leads", device.kind
    strokes = []
    for x, y in ((-0.55, -0.52), (0.58, -0.50), (-0.50, 0.42), (0.52, 0.46), (0.10, 0.02)):
        x, y = x + float(rng.uniform(-0.06, 0.06)), y + float(rng.uniform(-0.06, 0.06))
        strokes.append(Stroke(_circle(x, y, 0.022), 0.027, 0.85))
        end = (np.sign(x) * rng.uniform(0.5, 0.95), 1.05) if y > 0 else (np.sign(x) * 1.05, y - 0.2)
        strokes.append(Stroke(curve((x, y), (x + rng.uniform(-0.1, 0.1), y + 0.2), end), 0.019, 0.55))
    return strokes


def _lateral(device: Device, rng: np.random.Generator) -> list[Stroke]:
    if device.kind == "pacemaker":
        strokes = [Stroke(_rounded(-0.52, -0.45, 0.045, 0.10), 0, 0.95, True)]
        for end in ((-0.20, 0.10), (-0.40, 0.30)):
            strokes.append(Stroke(curve((-0.50, -0.45), (-0.1, -0.62), (0.05, -0.1), end, steps=20), 0.020, 0.8))
        return strokes
    if device.kind == "sternal wires":
        return [Stroke(_rounded(-0.56 + 0.02 * n, -0.34 + 0.15 * n, 0.022, 0.020), 0.017, 0.95) for n in range(5)]
    if device.kind == "port":
        path = curve((-0.58, -0.28), (-0.2, -0.75), (0.0, -0.4), (-0.02, -0.05))
        return [Stroke(_circle(-0.60, -0.28, 0.03), 0.03, 1.0), Stroke(path, 0.018, 0.7)]
    if device.kind == "endotracheal tube":
        return [Stroke(curve((-0.02, -1.0), (0.02, -0.6), (0.06, -0.38)), 0.03, 0.7)]
    if device.kind in ("central line", "enteric tube"):
        low = 0.05 if device.kind == "central line" else 0.55
        path = curve((0.0, -0.95), (0.10, -0.5), (0.12, low - 0.1), (0.0 + float(rng.uniform(0, 0.06)), low))
        return [Stroke(path, 0.020, 0.7)]
    if device.kind == "chest tube":
        return [Stroke(curve((0.1, 0.5), (0.25, 0.1), (0.15, -0.45)), 0.034, 0.65)]
    return []
