"""A chest from the side, front to the left of the picture: coarser than the front view, with the same findings."""

import numpy as np

from medclip_lab.data.phantom.anatomy import Body
from medclip_lab.data.phantom.canvas import Box, Canvas, Field, Stroke, curve
from medclip_lab.data.phantom.case import Finding

_DEPTH = {"upper": (-0.20, 0.25), "mid": (-0.35, -0.15), "lower": (0.22, 0.42)}  # the middle lobe lies in front
_HEIGHT = {"upper": (-0.50, -0.25), "mid": (-0.10, 0.15), "lower": (0.20, 0.42)}


class Lateral:
    """The fields of a side view, as `anatomy.Frontal` has them for the front."""

    def __init__(self, canvas: Canvas, body: Body, findings: dict[str, Finding]) -> None:
        self.canvas, self.body = canvas, body
        x, y = canvas.x, canvas.y
        self.findings = {name: finding for name, finding in findings.items() if finding.present}
        self.dense = np.zeros_like(x)
        # Breastbone in front, back of the ribs behind, both bowed.
        depth = 0.50 + 0.06 * body.habitus
        self.front = np.float32(-depth) + np.float32(0.22) * np.clip(np.float32(-0.15) - y, 0, 1)
        self.back = np.float32(0.60) - np.float32(0.45) * (y - np.float32(0.05)) ** 2
        self.spine = np.float32(0.40) - np.float32(0.30) * (y - np.float32(0.05)) ** 2
        collapse = 0.07 if "Atelectasis" in self.findings else 0.0
        slope = np.float32(0.62) * np.clip(x - np.float32(-0.10), 0, 1) ** 2
        self.dome = np.float32(body.dome - 0.10 - collapse) + slope + np.float32(0.25) * np.clip(-0.2 - x, 0, 1) ** 2
        self.wall = np.minimum(x - self.front, self.back - x)
        apex = y - np.float32(body.apex - 0.02) - np.float32(0.5) * (x - np.float32(0.10)) ** 2
        self.inside = canvas.edge(self.wall, 0.03) * canvas.edge(self.dome - y, 0.025) * canvas.edge(apex, 0.06)
        thick = np.clip(np.minimum(self.wall, self.dome - y) * np.float32(2.4), 0, 1)
        self.air = self.inside * (np.float32(0.72) + np.float32(0.28) * thick)
        self._middle()

    def _middle(self) -> None:
        canvas, found = self.canvas, self.findings
        grow = 1 + 0.28 * found["Cardiomegaly"].strength if "Cardiomegaly" in found else 1.0
        centre = (-0.24 + 0.10 * (grow - 1), self.body.dome - 0.28 - 0.12 * (grow - 1))
        r2 = canvas.distance2(centre, (0.24 * grow, 0.34 * grow), 0.55)
        self.heart = canvas.edge(1 - r2, 0.45) * (np.float32(0.5) + np.float32(0.5) * np.sqrt(np.clip(1 - r2, 0, 1)))
        self.air *= 1 - np.float32(0.80) * self.heart
        wide = 0.08 + (
            0.07 * found["Enlarged Cardiomediastinum"].strength if "Enlarged Cardiomediastinum" in found else 0
        )
        arch = canvas.strokes(
            [Stroke(curve((-0.16, 0.0), (-0.16, -0.55), (0.30, -0.52), (0.28, 0.1), steps=20), wide * 1.4, 0.8)],
            soft=True,
        )
        hilum = canvas.blob((0.06, -0.06), (0.09, 0.10))
        self.air *= 1 - np.float32(0.22) * arch - np.float32(0.30) * hilum

    def draw(self) -> dict[str, list[Box]]:
        """Put the findings into the lungs; the boxes of those that show from the side."""
        canvas, boxes = self.canvas, {}
        for name, finding in self.findings.items():
            rng, strength = np.random.default_rng((finding.nonce, 3)), finding.strength
            (x0, x1), (y0, y1) = _DEPTH[finding.zone or "mid"], _HEIGHT[finding.zone or "mid"]
            at = (x0 + (x1 - x0) * finding.place[1], y0 + (y1 - y0) * finding.place[0])
            mask: Field | None = None
            if name == "Lung Lesion":
                radius = (finding.size_cm or 2.0) / 30
                mask = canvas.edge(1 - canvas.distance2(at, (radius, radius)), 0.5) * np.float32(0.2 + 0.5 * strength)
            elif name == "Lung Opacity":
                mask = canvas.blob(at, (0.15, 0.15)) * np.float32(0.5 * strength)
            elif name == "Pneumonia":
                spots = np.clip(canvas.cloud(rng, 18) * np.float32(0.55) + np.float32(0.55), 0, 1)
                mask = (
                    canvas.edge(1 - canvas.distance2(at, (0.22, 0.20)), 0.8) * spots * np.float32(0.3 + 0.5 * strength)
                )
            elif name == "Consolidation":
                mask = canvas.edge(
                    1 - canvas.distance2(at, (0.26, 0.20), 0.5) + np.float32(0.2) * canvas.cloud(rng, 10), 0.5
                ) * np.float32(0.35 + 0.45 * strength)
            elif name == "Edema":
                haze = canvas.blob((0.06, -0.02), (0.26, 0.28)) * np.float32(0.5 * strength)
                self.air *= 1 - haze
            elif name == "Atelectasis":
                path = curve((at[0] - 0.2, 0.36), (at[0], 0.30), (at[0] + 0.18, 0.38))
                mask = canvas.strokes([Stroke(path, 0.034)]) * np.float32(0.3 + 0.45 * strength)
            elif name == "Pleural Effusion":
                height = (0.10, 0.24, 0.45)[finding.severity]
                level = np.float32(self.body.dome + 0.16 - height) - np.float32(0.5) * np.clip(canvas.x - 0.3, 0, 1)
                mask = canvas.edge(canvas.y - level, 0.03) * canvas.edge(canvas.x + np.float32(0.1), 0.3)
            elif name == "Pleural Other" and finding.kind == "thickening":
                mask = canvas.edge(np.float32(0.05 + 0.04 * strength) - (self.back - canvas.x), 0.02)
                mask = mask * canvas.edge(canvas.y, 0.2) * np.float32(0.7)
            if mask is not None:
                gone = self.air * np.clip(mask, 0, 1)
                self.air = self.air - gone
                box = canvas.box(gone)
                if box is not None:
                    boxes[name] = [box]
        return boxes

    def image(self, rng: np.random.Generator) -> Field:
        """Attenuation, roughly 0 (air) to 1 (metal)."""
        canvas, x, y, body = self.canvas, self.canvas.x, self.canvas.y, self.body
        pad = np.float32(0.12 + 0.08 * body.habitus + 0.08 * body.breast)
        chest = np.minimum(
            x - self.front + pad * np.exp(-((y - np.float32(0.05)) ** 2) * 4), self.back + np.float32(0.16) - x
        )
        arms = canvas.edge(np.float32(-0.52) - y + np.float32(0.3) * x, 0.25) * canvas.edge(
            np.float32(0.55) - np.abs(x), 0.1
        )
        skin = np.maximum(canvas.edge(chest, 0.06), arms)
        tissue = skin * np.float32(0.52 + 0.06 * body.habitus) + arms * np.float32(0.06)
        tissue += np.float32(0.16) * canvas.edge(y - self.dome, 0.04) * skin
        near = np.abs(x - self.spine)
        blocks = np.float32(0.6) + np.float32(0.4) * np.cos(y * np.float32(2 * np.pi / 0.125) + body.nonce % 5)
        spine = canvas.edge(np.float32(0.085) - near, 0.03) * (np.float32(0.10) + np.float32(0.08) * blocks)
        spine *= np.float32(1.15) - np.float32(0.45) * np.clip(
            y + np.float32(0.3), 0, 1
        )  # darker downwards, when healthy
        sternum = canvas.edge(np.float32(0.026) - np.abs(x - self.front + np.float32(0.02)), 0.02) * canvas.edge(
            0.3 - y, 0.1
        )
        slant = (y - np.float32(0.35) * (np.float32(0.5) - x) ** 2 + np.float32(0.28) * x) / np.float32(
            body.rib_spacing * 1.1
        )
        d = np.abs(slant - np.floor(slant) - np.float32(0.5))
        ribs = (
            np.clip((np.float32(0.17) - d) * np.float32(10), 0, 1)
            * self.inside
            * np.float32(0.4 + 0.6)
            * np.clip(x + 0.5, 0, 1)
        )
        trachea = canvas.strokes([Stroke(curve((-0.04, -1.0), (0.0, -0.6), (0.08, -0.22)), 0.075, 1.0)], soft=True)
        texture = canvas.cloud(rng, 14) * np.float32(0.012) + canvas.cloud(rng, 5) * np.float32(0.015)
        return np.asarray(
            tissue
            + spine
            + np.float32(0.10) * sternum
            + np.float32(0.05) * ribs
            + np.float32(0.08) * self.heart
            + np.float32(0.05) * canvas.cloud(np.random.default_rng(body.nonce), 24) * self.air
            + texture * skin
            + self.dense
            - np.float32(0.44) * self.air
            - np.float32(0.13) * trachea * (1 - self.inside * np.float32(0.6))
        )
