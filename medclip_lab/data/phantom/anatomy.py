"""A chest from the front, before anything is wrong with it: a patient's build, and the fields it is drawn from.

The picture is put together as a radiograph is: soft tissue, bone and fluid attenuate and add up, air in the lungs takes
away. So what overlaps adds, and a finding that replaces air hides vessels and borders as it does in a patient.
"""

from dataclasses import dataclass

import numpy as np

from medclip_lab.data.phantom.canvas import Canvas, Field, Stroke, curve, moved

SIDE = {"right": -1.0, "left": 1.0}  # the patient's right is on the left of the picture


@dataclass(frozen=True)
class Body:
    """The build of a patient, the same in each of their studies. Lengths in body units (one is about 20 cm)."""

    sex: str
    habitus: float
    """0 thin to 1 obese."""
    width: float
    apex: float
    dome: float
    dome_step: float
    heart: float
    tilt: float
    mediastinum: float
    knob: float
    rib_spacing: float
    rib_slope: float
    rib_start: float
    clavicle: float
    scapula: float
    scoliosis: float
    breast: float
    bubble: float
    nonce: int

    @classmethod
    def sample(cls, rng: np.random.Generator, age: int, sex: str) -> "Body":
        woman, old = sex == "F", np.clip((age - 40) / 45, 0, 1)
        return cls(
            sex=sex,
            habitus=float(rng.beta(2, 2.5)),
            width=float(rng.normal(0.70 if woman else 0.735, 0.025)),
            apex=float(rng.normal(-0.72, 0.03)),
            dome=float(rng.normal(0.50, 0.05)),
            dome_step=float(rng.uniform(0.02, 0.08)),
            heart=float(rng.normal(0.325, 0.016) + 0.012 * old),
            tilt=float(rng.normal(0.62, 0.09)),
            mediastinum=float(rng.normal(0.118, 0.013) + 0.008 * old),
            knob=float(rng.normal(0.075, 0.008) + 0.02 * old),
            rib_spacing=float(rng.normal(0.132, 0.007)),
            rib_slope=float(rng.normal(0.42, 0.06)),
            rib_start=float(rng.normal(-0.62, 0.02)),
            clavicle=float(rng.normal(0, 0.03)),
            scapula=float(rng.normal(0, 0.04)),
            scoliosis=float(rng.normal(0, 0.018)),
            breast=float(rng.uniform(0.3, 1.0)) if woman else 0.0,
            bubble=float(rng.uniform(0, 1)),
            nonce=int(rng.integers(2**31)),
        )


@dataclass
class Shape:
    """What findings change about the anatomy before it is drawn."""

    heart: float = 1.0
    """Factor on the heart's width."""
    mediastinum: float = 0.0
    """Added to its half-width."""
    knob: float = 0.0
    shift: float = 0.0
    """Of heart, trachea and mediastinum to the right of the picture."""
    raised: tuple[float, float] = (0.0, 0.0)
    """How far the right and the left dome stand higher."""
    vessels: float = 1.0


class Frontal:
    """The fields of a frontal view. Findings lower `air`, raise `dense`, dim `vessels`; `image()` adds it all up."""

    def __init__(self, canvas: Canvas, body: Body, shape: Shape, supine: bool, rotation: float) -> None:
        self.canvas, self.body, self.shape, self.supine = canvas, body, shape, supine
        x, y = canvas.x, canvas.y
        self.spine = np.float32(body.scoliosis) * np.sin(np.float32(2.6) * y + np.float32(body.nonce % 7))
        self.middle = self.spine + np.float32(rotation * 0.05 + shape.shift)  # of what lies in front of the spine
        self.left = x > self.spine
        self.u = np.abs(x - self.spine)
        self.dense = np.zeros_like(x)
        self.bone = np.zeros_like(x)
        self._lungs()
        self._heart()
        self._vessels()

    def of_side(self, right: float, left: float) -> Field:
        """A field with one value in the patient's right half, another in the left."""
        return np.where(self.left, np.float32(left), np.float32(right))

    def half(self, side: str) -> Field:
        """1 in one half of the picture, for "left" and "right"."""
        return np.asarray(self.left if side == "left" else ~self.left, dtype=np.float32)

    def wall(self, y: Field) -> Field:
        """Distance of the inner chest wall from the spine, at height y."""
        body = self.body
        top, wide = np.float32(body.apex), np.float32(0.30)
        t = np.clip((wide - y) / (wide - top), 0, 1)
        rise = np.power(np.maximum(1 - np.power(t, np.float32(2.3)), 0), np.float32(0.62))
        w = np.float32(0.13) + np.float32(body.width - 0.13) * rise
        return np.asarray(w - np.float32(0.10) * np.maximum(y - wide, 0))

    def dome_heights(self) -> tuple[float, float]:
        """y of the top of the right and the left diaphragm."""
        body, low = self.body, 0.09 if self.supine else 0.0
        right, left = self.shape.raised
        return body.dome - low - right, body.dome + body.dome_step - low - left

    def _lungs(self) -> None:
        canvas, body, shape, y = self.canvas, self.body, self.shape, self.canvas.y
        self.wall_width = self.wall(y)
        right, left = self.dome_heights()
        self.dome = self.of_side(right, left) + np.float32(0.9) * (self.u - np.float32(0.30)) ** 2
        x = canvas.x - self.middle
        # The mediastinum: narrow above, wider at the roots; the knob of the aorta on the left.
        waist = np.float32(body.mediastinum) + np.float32(0.05) * np.clip(y + np.float32(0.45), 0, 1)
        if shape.mediastinum:
            waist = waist + np.float32(shape.mediastinum) * np.exp(-(((y + np.float32(0.36)) / np.float32(0.27)) ** 4))
        knob = body.knob + shape.knob
        arch = 1 - canvas.distance2((shape.shift + body.mediastinum * 0.75, -0.36), (knob * 1.15, knob * 1.3))
        trunk = 1 - canvas.distance2((shape.shift + 0.12, -0.14), (0.10, 0.14))
        self.centre = np.maximum.reduce(
            [canvas.edge(waist - np.abs(x), 0.03), canvas.edge(arch, 0.35), canvas.edge(trunk, 0.5) * np.float32(0.8)]
        )
        inner = self.wall_width - self.u
        self.inside = canvas.edge(inner, 0.02) * canvas.edge(self.dome - y, 0.022)
        self.inside *= canvas.edge(y - np.float32(body.apex), 0.03)
        depth = np.clip(np.minimum(inner, self.dome - y) * np.float32(3.2), 0, 1)
        self.air = self.inside * (np.float32(0.80) + np.float32(0.20) * depth)
        self.air *= 1 - np.float32(0.97) * self.centre

    def _heart(self) -> None:
        body, canvas = self.body, self.canvas
        low = self.dome_heights()[1] - self.shape.raised[0] * 0.2
        wide = body.heart * self.shape.heart * (1.12 if self.supine else 1.0)
        tall = (0.245 + 0.10 * (wide - 0.32)) * (1.05 if self.supine else 1.0)
        centre = (self.shape.shift + 0.135 + 0.42 * (wide - 0.325), low - 0.16 - 0.25 * (wide - 0.325))
        r2 = canvas.distance2(centre, (wide, tall), body.tilt - 0.5 * (wide - 0.325))
        atrium = (self.shape.shift - 0.045 - 0.25 * (wide - 0.325), low - 0.20)
        a2 = canvas.distance2(atrium, (0.16, 0.21))
        self.heart = np.maximum(canvas.edge(1 - r2, 0.12), canvas.edge(1 - a2, 0.2))
        self.heart_thick = np.sqrt(np.clip(1 - r2, 0, 1)) * self.heart
        self.air *= 1 - self.heart * (np.float32(0.62) + np.float32(0.34) * self.heart_thick)

    def _vessels(self) -> None:
        """Branches that leave the hila and thin out, the same in every study of a patient."""
        rng = np.random.default_rng(self.body.nonce)
        sign = np.repeat([-1.0, 1.0], 9)
        fan = np.tile(np.linspace(-1.35, 1.25, 9), 2) + rng.normal(0, 0.12, 18)
        reach = (0.34 + 0.16 * np.abs(np.sin(fan))) * rng.uniform(0.8, 1.15, 18)
        hilum = np.stack([0.17 * sign + self.shape.shift, -0.06 - 0.03 * sign], axis=1)
        t = np.linspace(0, 1, 5)
        turn = fan[:, None] + rng.normal(0, 0.55, 18)[:, None] * (t - 0.3)  # the branches bend as they go
        path = np.stack([np.cos(turn) * sign[:, None], np.sin(turn)], axis=2)
        path = hilum[:, None] + path * (reach[:, None] * t)[:, :, None]
        lean = turn[:, 1:4] + np.array([0.6, -0.6, 0.5]) + rng.normal(0, 0.2, 18)[:, None]
        twigs = np.stack([np.cos(lean) * sign[:, None], np.sin(lean)], axis=2) * (0.33 * reach)[:, None, None]
        # A branch with its twigs is one line that runs into each twig and back: far fewer lines to draw.
        order = [path[:, :1]]
        for n in range(1, 4):
            order += [path[:, n : n + 1], path[:, n : n + 1] + twigs[:, n - 1 : n], path[:, n : n + 1]]
        strokes = [Stroke(line, 0.013, 0.4) for line in np.concatenate([*order, path[:, 4:]], axis=1)]
        # Ever thicker over the part next to the hilum.
        for points, width, value in ((4, 0.021, 0.55), (3, 0.030, 0.70), (2, 0.042, 0.85)):
            strokes += [Stroke(line[:points], width, value) for line in path]
        for x, s in ((hilum[0, 0], -1), (hilum[-1, 0], 1)):
            strokes.append(Stroke(curve((x, -0.13), (x + 0.03 * s, 0.0), (x, 0.16)), 0.07, 0.6))
        self.vessels = self.canvas.strokes(strokes, soft=True)

    def ribs(self, breaks: list[tuple[float, float, float]]) -> Field:
        """The rib cage; `breaks` are (x, y, step) where a rib is broken and displaced by `step` spacings."""
        body, canvas, u, y = self.body, self.canvas, self.u, self.canvas.y
        cage = canvas.edge(self.wall_width + np.float32(0.035) - u, 0.03) * canvas.edge(
            self.dome + np.float32(0.18) - y, 0.35
        )
        space = np.float32(1 / body.rib_spacing)
        back = (y - np.float32(body.rib_start) - np.float32(body.rib_slope) * u * u + np.float32(0.04)) * space
        front = (y - np.float32(body.rib_start + 0.02) - np.float32(0.52) * (np.float32(0.72) - u)) * space
        gap = np.float32(1)
        for at_x, at_y, step in breaks:
            near = np.exp(-(((canvas.x - np.float32(at_x)) / np.float32(0.12)) ** 2))
            row = np.exp(-(((y - np.float32(at_y)) / np.float32(0.085)) ** 4))
            outer = np.abs(canvas.x) > abs(at_x)
            back = back - np.where(outer, np.float32(step), np.float32(-step * 0.4)) * near * row
            split = np.exp(-(((canvas.x - np.float32(at_x)) / np.float32(0.024)) ** 2))
            gap = gap * (1 - np.float32(0.95) * split * row)
        rear = self._row_of_ribs(back, 0.20) * (back > 0) * gap
        fore = self._row_of_ribs(front, 0.23) * (front > 1) * canvas.edge(u - np.float32(0.30), 0.10)
        return np.asarray((rear + np.float32(0.75) * fore) * cage)

    def _row_of_ribs(self, phase: Field, half: float) -> Field:
        d = np.abs(phase - np.floor(phase) - np.float32(0.5))
        solid = np.clip((np.float32(half) - d) * np.float32(self.body.rib_spacing / self.canvas.pixel) + 0.5, 0, 1)
        profile = np.float32(0.62) + np.float32(0.38 / half**2) * np.minimum(d, np.float32(half)) ** 2
        return np.asarray(solid * profile)

    def rib_point(self, side: str, number: int, u: float) -> tuple[float, float]:
        """Where the middle of a posterior rib (1 is the first) lies at distance u from the spine."""
        body = self.body
        y = body.rib_start + (number - 0.5) * body.rib_spacing + body.rib_slope * u * u - 0.04
        return SIDE[side] * u + self.spine_at(y), y

    def spine_at(self, y: float) -> float:
        return float(self.body.scoliosis * np.sin(2.6 * y + self.body.nonce % 7))

    def image(self, rng: np.random.Generator) -> Field:
        """Attenuation, roughly 0 (air) to 1 (metal)."""
        canvas, body, x, y = self.canvas, self.body, self.canvas.x, self.canvas.y
        wide = body.width + 0.12 + 0.12 * body.habitus
        flank = np.float32(wide) + np.float32(0.06 * body.habitus) * np.clip(y, 0, 1)
        shoulder = np.float32(0.27) + np.float32(2.4) * np.clip(y + np.float32(0.88), 0, 1) ** np.float32(0.85)
        armpit = np.clip((np.float32(0.05) - y) * np.float32(2.2), 0, 1)
        skin = canvas.edge(np.minimum(shoulder, flank + np.float32(0.6) * armpit * armpit) - np.abs(x), 0.06)
        arms = np.float32(0.8 if self.supine else 0.0)  # a lying patient's arms lie beside the chest
        limb = canvas.edge(np.abs(x) - np.float32(wide + 0.06), 0.05) * canvas.edge(y + np.float32(0.3), 0.2) * arms
        tissue = np.maximum(skin, limb * np.float32(0.9)) * np.float32(0.50 + 0.06 * body.habitus)
        tissue += np.float32(0.05) * skin * canvas.edge(self.u - self.wall_width, 0.1)
        belly = canvas.edge(y - self.dome, 0.03) * skin
        tissue += np.float32(0.16) * belly * canvas.edge(flank - self.u, 0.25)
        if body.bubble > 0.35:
            left = self.dome_heights()[1]
            size = 0.06 + 0.08 * body.bubble
            gas = canvas.edge(1 - canvas.distance2((0.34, left + 0.07 + size * 0.6), (size * 1.3, size * 0.8)), 0.4)
            tissue -= np.float32(0.26) * gas * belly
        if body.breast:
            for sign in (-1, 1):
                fold = canvas.distance2((sign * 0.42, 0.28), (0.30, 0.20 + 0.07 * body.breast))
                tissue += np.float32(0.085 * body.breast) * canvas.edge(1 - fold, 0.45)
        # Spine: a column with the rhythm of its discs; shows through the heart.
        rows = np.float32(0.75) + np.float32(0.25) * np.cos(y * np.float32(2 * np.pi / 0.118) + body.nonce % 5)
        column = canvas.edge(np.float32(0.085) - self.u, 0.04)
        central = column * (np.float32(0.10) + np.float32(0.05) * rows) + np.float32(0.05) * self.centre
        heart = self.heart * np.float32(0.03) + np.float32(0.10) * self.heart_thick
        # The trachea and the main bronchi are the only air in the middle.
        trachea = canvas.edge(np.float32(0.036) - np.abs(x - self.middle * np.float32(1.1)), 0.03)
        trachea *= canvas.edge(np.float32(-0.24) - y, 0.05) * canvas.edge(y + np.float32(1.2), 0.1)
        bronchi = self.canvas.strokes(
            [
                Stroke(curve((self.shape.shift, -0.27), (self.shape.shift - 0.10, -0.17), (-0.19, -0.06)), 0.045, 0.6),
                Stroke(curve((self.shape.shift, -0.27), (self.shape.shift + 0.12, -0.17), (0.21, -0.10)), 0.040, 0.6),
            ],
            soft=True,
        )
        shade = self._scapulae() * np.float32(0.06 if not self.supine else 0.10)
        pulp = np.float32(0.15 * self.shape.vessels) * self.vessels * np.clip(self.air * np.float32(1.3), 0, 1)
        texture = canvas.cloud(rng, 14) * np.float32(0.012) + canvas.cloud(rng, 5) * np.float32(0.012)
        return np.asarray(
            tissue
            + central
            + heart
            + shade
            + pulp
            + texture * skin
            + self.bone
            + self.dense
            - np.float32(0.46) * self.air
            - np.float32(0.16) * np.maximum(trachea, bronchi)
        )

    def _scapulae(self) -> Field:
        strokes = []
        drawn_in = self.body.scapula + (0.10 if self.supine else 0.0)
        for sign in (-1, 1):
            top, tip = (sign * (0.80 - drawn_in), -0.50), (sign * (0.66 - drawn_in), 0.02)
            strokes.append(
                Stroke(np.array([top, (sign * (0.62 - drawn_in), -0.47), tip, (sign * 0.98, -0.42)]), 0, 1, True)
            )
            strokes.append(Stroke(np.array([(sign * (0.62 - drawn_in), -0.47), tip]), 0.03, 1))
        return self.canvas.strokes(strokes, soft=True)

    def clavicles(self, broken: str, step: float, at: float) -> Field:
        """Both collar bones; the one of side `broken` in two parts that no longer meet."""
        lift = self.body.clavicle + (0.05 if self.supine else 0.0)
        strokes = []
        for side, sign in SIDE.items():
            path = curve(
                (sign * 0.11, -0.47 - lift),
                (sign * 0.30, -0.62 - lift),
                (sign * 0.50, -0.60 - lift),
                (sign * 0.82, -0.74),
            )
            if side == broken:
                cut = round(at * len(path))
                inner, outer = moved(path[:cut], 0, -0.5 * step), moved(path[cut:], -sign * 0.03, 0.9 * step)
                strokes += [Stroke(inner, 0.062, 0.9), Stroke(outer, 0.062, 0.9)]
            else:
                strokes.append(Stroke(path, 0.058, 0.9))
        return self.canvas.strokes(strokes, soft=True)
