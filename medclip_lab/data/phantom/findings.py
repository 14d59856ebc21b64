"""How each finding shows in a frontal view: what it changes about the anatomy, or what it puts into the lungs.

Every function that draws returns the boxes of what it drew, as fractions of the picture.
"""

from collections.abc import Callable

import numpy as np

from medclip_lab.data.phantom.anatomy import SIDE, Frontal, Shape
from medclip_lab.data.phantom.canvas import Box, Field, Stroke, curve
from medclip_lab.data.phantom.case import Finding

_HEIGHT = {"upper": (0.20, 0.40), "mid": (0.44, 0.62), "lower": (0.68, 0.86)}  # of the lung, from apex to diaphragm


def shape_of(findings: dict[str, Finding]) -> Shape:
    """What the findings that are drawn change about heart, mediastinum and diaphragm."""
    shape, right, left = Shape(), 0.0, 0.0
    for name, finding in findings.items():
        if not finding.present:
            continue
        strength = finding.strength
        if name == "Cardiomegaly":
            shape.heart = 1 + 0.36 * strength
        elif name == "Enlarged Cardiomediastinum":
            shape.mediastinum = 0.12 * strength * (0.7 if finding.kind == "aorta" else 1)
            shape.knob = 0.09 * strength if finding.kind == "aorta" else 0.0
        elif name == "Edema":
            shape.vessels = 1 + 0.4 * strength
        elif name == "Pneumothorax" and finding.kind == "tension":
            shape.shift -= 0.11 * SIDE[finding.side]
        elif name == "Atelectasis":
            amount = (0.12 if finding.kind == "volume loss" else 0.055) * strength
            right += amount if "right" in finding.sides else 0.0
            left += amount if "left" in finding.sides else 0.0
            if finding.kind == "volume loss":
                shape.shift += 0.05 * SIDE[finding.side]
    shape.raised = (right, left)
    return shape


def draw_findings(scene: Frontal, findings: dict[str, Finding]) -> dict[str, list[Box]]:
    """Draw all that is present into the scene; boxes per finding, of those that have a place."""
    boxes: dict[str, list[Box]] = {}
    for name, draw in _DRAW.items():  # in this order: what takes a lung away comes last
        finding = findings.get(name)
        if finding is not None and finding.present:
            found = [box for side in finding.sides for box in draw(scene, finding, side) if box is not None]
            if found:
                boxes[name] = found
    return boxes


def silhouettes(scene: Frontal, findings: dict[str, Finding]) -> dict[str, list[Box]]:
    """The boxes of an enlarged heart and of a wide mediastinum: what is large is all of it."""
    upper = scene.centre * scene.canvas.edge(np.float32(-0.05) - scene.canvas.y) * scene.inside
    masks = {"Cardiomegaly": scene.heart, "Enlarged Cardiomediastinum": upper}
    boxes = {name: scene.canvas.box(mask) for name, mask in masks.items() if findings[name].present}
    return {name: [box] for name, box in boxes.items() if box is not None}


def _locate(scene: Frontal, finding: Finding, side: str, low: float = 0.30, high: float = 0.70) -> tuple[float, float]:
    """A point of the lung in side and zone, clear of the heart; `low` and `high` bound its way to the chest wall."""
    top, bottom = _HEIGHT[finding.zone or "mid"]
    right, left = scene.dome_heights()
    dome = left if side == "left" else right
    y = scene.body.apex + (dome - scene.body.apex) * (top + (bottom - top) * finding.place[0])
    wall = float(scene.wall(np.array(y, dtype=np.float32)))
    inner = 0.16 + (0.20 * max(0.0, y + 0.05) * scene.shape.heart if side == "left" else 0.05)
    part = low + (high - low) * finding.place[1]
    return scene.spine_at(y) + SIDE[side] * (inner + (wall - inner) * part), y


def _rng(finding: Finding, side: str) -> np.random.Generator:
    return np.random.default_rng((finding.nonce, int(SIDE[side]) + 1))


def _fill(scene: Frontal, mask: Field, amount: float) -> Box | None:
    """Replace air by something dense; the box is that of the air that is gone."""
    gone = scene.air * np.clip(mask * np.float32(amount), 0, 1)
    scene.air = scene.air - gone
    return scene.canvas.box(gone)


def _lesion(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    rng, canvas, boxes = _rng(finding, side), scene.canvas, []
    for number in range((finding.count + 1) // 2 if finding.side == "bilateral" else 1):
        at, radius = _locate(scene, finding, side), (finding.size_cm or 2.0) / 30
        if finding.side == "bilateral":  # scattered over the lung
            at = _locate_anywhere(scene, rng, side)
            radius *= 0.75 if number else 1.0
        d2 = canvas.distance2(at, (radius, radius * rng.uniform(0.85, 1.15)), rng.uniform(0, 3))
        if finding.kind == "mass":
            d2 = d2 + np.float32(0.22) * canvas.cloud(rng, 12)
        solid = canvas.edge(1 - d2, 0.5)
        boxes.append(_fill(scene, solid, 0.45 + 0.55 * finding.strength))
        scene.dense += np.float32(0.12 * finding.strength) * solid * scene.inside
    return boxes


def _locate_anywhere(scene: Frontal, rng: np.random.Generator, side: str) -> tuple[float, float]:
    zone = str(rng.choice(("upper", "mid", "lower")))
    place = (float(rng.random()), float(rng.random()))
    return _locate(scene, Finding(name="", zone=zone, place=place), side, 0.2, 0.8)


def _opacity(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    rng, canvas = _rng(finding, side), scene.canvas
    at = _locate(scene, finding, side)
    patch = canvas.blob(at, (rng.uniform(0.13, 0.18), rng.uniform(0.12, 0.18)), rng.uniform(0, 3))
    return [_fill(scene, patch * scene.half(side), 0.90 * finding.strength)]


def _pneumonia(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    """Many small dense spots that run together, in one segment."""
    rng, canvas = _rng(finding, side), scene.canvas
    x, y = _locate(scene, finding, side)
    segment = canvas.edge(1 - canvas.distance2((x, y), (0.24, 0.21), rng.uniform(-0.6, 0.6)), 0.8)
    grain = canvas.cloud(rng, 22) * np.float32(0.55) + canvas.cloud(rng, 12) * np.float32(0.35)
    spots = canvas.edge(grain + np.float32(0.05), 1.0)
    return [_fill(scene, segment * spots * scene.half(side), 0.45 + 0.62 * finding.strength)]


def _consolidation(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    """A lobe, dense up to its fissure, with the bronchi still open in it."""
    rng, canvas, sign = _rng(finding, side), scene.canvas, SIDE[side]
    right, left = scene.dome_heights()
    dome, apex = (left if side == "left" else right), scene.body.apex
    upper = apex + (0.46 + 0.08 * finding.place[0]) * (dome - apex)
    lower = apex + (0.62 + 0.08 * finding.place[0]) * (dome - apex)
    tilt = np.float32(rng.uniform(-0.10, 0.25)) * (scene.u - np.float32(0.4))
    y = canvas.y - tilt
    lobe = {
        "upper": canvas.edge(np.float32(upper) - y, 0.02),
        "mid": canvas.edge(y - np.float32(upper), 0.02) * canvas.edge(np.float32(upper + 0.30) - y, 0.16),
        "lower": canvas.edge(y - np.float32(lower), 0.10),
    }[finding.zone]
    reach = np.float32((0.46, 0.58, 0.78)[finding.severity])
    lobe = lobe * canvas.edge(reach - scene.u, 0.22) * scene.half(side)
    strokes = []
    hilum = (sign * 0.18, -0.05)
    for target in rng.uniform(-0.16, 0.16, 4):
        end_y = {"upper": apex + 0.2, "mid": upper + 0.16, "lower": dome - 0.06}[finding.zone]
        end = (sign * rng.uniform(0.34, 0.58), end_y + target)
        strokes.append(Stroke(curve(hilum, (sign * 0.30, (end_y - 0.05) / 2 + target), end), 0.022))
    bronchi = canvas.strokes(strokes)
    return [_fill(scene, lobe * (1 - np.float32(0.75) * bronchi), 0.40 + 0.55 * finding.strength)]


def _edema(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    """Haze around the hilum, and short septal lines at the base."""
    rng, canvas, sign, strength = _rng(finding, side), scene.canvas, SIDE[side], finding.strength
    at = (sign * (0.28 + 0.03 * rng.random()), 0.02)
    haze = canvas.blob(at, (0.19, 0.27), sign * 0.25)
    amount = (0.42 if finding.kind == "alveolar" else 0.30) * strength
    _fill(scene, haze * (1 + np.float32(0.22) * canvas.cloud(rng, 16)) * scene.half(side), amount)
    right, left = scene.dome_heights()
    dome = left if side == "left" else right
    lines = []
    for number in range(int(3 + 4 * strength)):
        y = dome + 0.05 - 0.062 * number
        wall = float(scene.wall(np.array(y, dtype=np.float32))) - 0.015
        lines.append(Stroke(np.array([(sign * (wall - 0.11), y + 0.012), (sign * wall, y)]), 0.017))
    scene.dense += np.float32(0.10 * strength) * canvas.strokes(lines) * scene.inside
    return []  # diffuse: no place to point at


def _atelectasis(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    rng, canvas, sign, strength = _rng(finding, side), scene.canvas, SIDE[side], finding.strength
    right, left = scene.dome_heights()
    dome = left if side == "left" else right
    if finding.kind == "volume loss":
        # A collapsed lower lobe: a wedge behind the heart or beside it, its edge the displaced fissure.
        edge = (canvas.x * np.float32(sign) - np.float32(0.12)) - np.float32(0.88) * (canvas.y + np.float32(0.05))
        wedge = canvas.edge(-edge, 0.025) * canvas.edge(canvas.y + np.float32(0.10), 0.1) * scene.half(side)
        return [_fill(scene, wedge, 0.45 + 0.5 * strength)]
    base = dome - 0.07 if finding.zone == "lower" else dome - 0.33
    strokes = []
    for number in range(1 + (finding.severity > 0)):
        y = base - rng.uniform(0.10, 0.15) * number - 0.06 * finding.place[0]
        start, length = rng.uniform(0.22, 0.34), rng.uniform(0.24, 0.36)
        rise = rng.uniform(-0.15, 0.05)
        path = curve(
            (sign * start, y),
            (sign * (start + length / 2), y + rise),
            (sign * (start + length), y + rise * rng.uniform(0.3, 1.2)),
        )
        strokes.append(Stroke(path, rng.uniform(0.042, 0.060)))
    bands = canvas.strokes(strokes)
    return [_fill(scene, bands, 0.50 + 0.50 * strength)]


def _pneumothorax(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    """The lung falls away from the wall: its edge is a line, beyond it there is air and nothing else."""
    canvas, sign = scene.canvas, SIDE[side]
    size = (0.12, 0.19, 0.30)[finding.severity] if finding.state != -1 else 0.07
    drop = 1.7 * size
    # Widest above: in a lying patient air also gathers at the base.
    fall = np.clip(np.float32(0.55) - canvas.y, 0.25 if scene.supine or finding.severity == 2 else 0.0, 1.1)
    shrunk = scene.wall(canvas.y - np.float32(drop)) - np.float32(size) * fall - scene.u
    lung = canvas.edge(shrunk, 0.012)
    space = scene.inside * (1 - lung) * (1 - scene.centre) * (1 - scene.heart) * scene.half(side)
    line = np.exp(-((shrunk / np.float32(0.014)) ** 2)) * scene.inside * (1 - scene.centre) * scene.half(side)
    scene.dense += np.float32(0.14 + 0.10 * finding.strength) * line
    squeezed = scene.half(side) * lung * scene.inside
    scene.air *= 1 - np.float32(0.9 * size) * squeezed
    scene.air = np.maximum(scene.air, space * np.float32(1.08))
    scene.vessels = scene.vessels * (1 - space)
    assert sign
    return [canvas.box(space)]


def _effusion(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    """Fluid that fills the angle first and climbs along the wall; lying down it spreads behind the lung."""
    canvas = scene.canvas
    right, left = scene.dome_heights()
    dome = left if side == "left" else right
    height = (0.14, 0.27, 0.52)[finding.severity] if finding.state != -1 else 0.10
    height *= 0.85 + 0.3 * finding.place[0]
    across = np.clip(scene.u / scene.wall_width, 0, 1.2)
    level = np.float32(dome + 0.12) - np.float32(height) * (np.float32(0.55) + np.float32(0.75) * across**4)
    fluid = canvas.edge(canvas.y - level, 0.03 if not scene.supine else 0.10) * scene.half(side)
    gone = scene.air * fluid * np.float32(0.95)
    if scene.supine:
        veil = np.clip((canvas.y - np.float32(dome - 2.6 * height - 0.15)) * np.float32(1.6), 0, 1) * scene.half(side)
        gone = np.maximum(gone, scene.air * veil * np.float32(0.30 + 0.35 * height))
    scene.air = scene.air - gone
    scene.dense += np.float32(0.10) * fluid * scene.inside
    return [canvas.box(gone)]


def _pleural(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    rng, canvas, strength = _rng(finding, side), scene.canvas, finding.strength
    inner = scene.wall_width - scene.u
    if finding.kind == "plaque":  # calcified, so brighter than tissue, with sharp uneven borders
        strokes = []
        for _ in range(int(rng.integers(2, 4))):
            x, y = _locate_anywhere(scene, rng, side)
            turns = np.linspace(0, 2 * np.pi, 9)[:-1]
            radii = rng.uniform(0.055, 0.085, 8)
            outline = np.stack([x + 1.5 * radii * np.cos(turns), np.clip(y, -0.3, 0.5) + radii * np.sin(turns)], axis=1)
            strokes.append(Stroke(outline, 0, 1, True))
        plaques = canvas.strokes(strokes) * scene.inside
        scene.dense += np.float32(0.42 * strength + 0.14) * plaques
        return [canvas.box(plaques)]
    if finding.kind == "apical cap":
        # The apex of the lung is as round as ever, only lower.
        lower = canvas.y - np.float32(0.13 + 0.08 * strength)
        lung = np.minimum(scene.wall(lower) - scene.u, lower - np.float32(scene.body.apex))
        cap = canvas.edge(-lung, 0.02) * canvas.edge(np.float32(scene.body.apex + 0.30) - canvas.y, 0.12)
        return [_fill(scene, cap * scene.half(side), 0.9)]
    top = -0.35 + 0.25 * finding.place[0]
    span = canvas.edge(np.float32(0.30) - np.abs(canvas.y - np.float32(top + 0.30)), 0.12)
    depth = np.float32(0.15 + 0.06 * strength) * (1 + np.float32(0.3) * canvas.cloud(rng, 9)) * span
    rind = canvas.edge(depth - inner, 0.02) * span * scene.half(side)
    return [_fill(scene, rind, 0.9)]


def _fracture(scene: Frontal, finding: Finding, side: str) -> list[Box | None]:
    """Bones are drawn by `draw_bones`; here only the swelling and the callus around the break."""
    canvas, boxes = scene.canvas, []
    for at in fracture_points(scene, finding, side):
        radius = 0.095
        callus = canvas.blob(at, (radius * 0.8, radius * 0.7))
        scene.dense += np.float32(0.26 + 0.30 * finding.strength) * callus
        boxes.append(canvas.box(canvas.edge(1 - canvas.distance2(at, (1.9 * radius, 1.9 * radius)))))
    return boxes


def fracture_points(scene: Frontal, finding: Finding, side: str) -> list[tuple[float, float]]:
    """Where the bone is broken, in body coordinates."""
    if finding.kind == "clavicle":
        return [(SIDE[side] * (0.34 + 0.14 * finding.place[0]), -0.615 - scene.body.clavicle - 0.05 * scene.supine)]
    first = 4 + int(3 * finding.place[1])
    return [
        scene.rib_point(side, first + number, 0.52 + 0.10 * finding.place[0] - 0.03 * number)
        for number in range(finding.count)
    ]


def draw_bones(scene: Frontal, findings: dict[str, Finding]) -> None:
    """Ribs and collar bones, with the breaks that are there."""
    fracture = findings.get("Fracture")
    breaks: list[tuple[float, float, float]] = []
    broken, step, at = "", 0.0, 0.5
    if fracture is not None and fracture.present:
        if fracture.kind == "clavicle":
            broken, step, at = fracture.side, 0.09 + 0.05 * fracture.strength, 0.4 + 0.2 * fracture.place[0]
        else:
            points = fracture_points(scene, fracture, fracture.side)
            breaks = [(x, y, 0.50 + 0.25 * fracture.strength) for x, y in points]
    scene.bone += np.float32(0.115) * scene.ribs(breaks)
    scene.bone += np.float32(0.15) * scene.clavicles(broken, step, at)


_DRAW: dict[str, Callable[[Frontal, Finding, str], list[Box | None]]] = {
    "Edema": _edema,
    "Lung Opacity": _opacity,
    "Pneumonia": _pneumonia,
    "Consolidation": _consolidation,
    "Atelectasis": _atelectasis,
    "Lung Lesion": _lesion,
    "Pleural Other": _pleural,
    "Fracture": _fracture,
    "Pleural Effusion": _effusion,
    "Pneumothorax": _pneumothorax,
}
