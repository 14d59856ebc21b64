"""What is wrong with a phantom patient: correlated findings, how the report speaks of them, and how they change.

The prevalences are set so that every one of the fourteen observations is positive in at least 5 % of the studies (rare
ones are more frequent than in a hospital) while what occurs together does so as it does there: edema with a large heart
and effusions, pneumonia with consolidation, fractures with pneumothorax, devices with the sick.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT, SUPPORT_DEVICES, UNCERTAIN

NAMES = tuple(name for name in CHEXPERT14 if name != NO_FINDING)
CHRONIC = ("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Pleural Other", "Fracture", SUPPORT_DEVICES)
PARENCHYMAL = ("Lung Lesion", "Lung Opacity", "Edema", "Consolidation", "Pneumonia", "Atelectasis")

# Per theme: weight among abnormal studies, then the chance of each finding in the order of NAMES.
#          weight  ECM  heart lesion opac edema consol pneum atel  ptx   eff  pl.oth fract devices
_THEMES: dict[str, tuple[float, ...]] = {
    "heart": (0.21, 0.06, 0.85, 0.02, 0.05, 0.70, 0.03, 0.04, 0.25, 0.01, 0.60, 0.03, 0.03, 0.35),
    "infection": (0.18, 0.02, 0.10, 0.03, 0.15, 0.05, 0.48, 0.70, 0.15, 0.02, 0.25, 0.06, 0.02, 0.15),
    "intensive": (0.18, 0.15, 0.30, 0.03, 0.30, 0.30, 0.24, 0.15, 0.50, 0.20, 0.45, 0.04, 0.05, 0.95),
    "trauma": (0.14, 0.16, 0.05, 0.02, 0.20, 0.03, 0.07, 0.03, 0.15, 0.62, 0.15, 0.05, 0.62, 0.25),
    "tumour": (0.14, 0.25, 0.08, 0.80, 0.05, 0.02, 0.12, 0.08, 0.20, 0.10, 0.30, 0.20, 0.06, 0.20),
    "chronic": (0.15, 0.30, 0.35, 0.15, 0.20, 0.03, 0.05, 0.05, 0.25, 0.06, 0.12, 0.42, 0.15, 0.10),
}
THEMES = ("normal", *_THEMES)
_NORMAL_SHARE = 0.36
_AGE = {"normal": 50, "heart": 70, "trauma": 47, "tumour": 66}  # means, 62 for the others

# Which devices a theme brings, each with its chance once there is a device at all.
_DEVICES: dict[str, dict[str, float]] = {
    "normal": {"pacemaker": 0.4, "port": 0.3, "sternal wires": 0.4},
    "heart": {"pacemaker": 0.5, "sternal wires": 0.4, "central line": 0.25, "ecg leads": 0.3},
    "infection": {"central line": 0.6, "endotracheal tube": 0.35, "enteric tube": 0.35, "ecg leads": 0.3},
    "intensive": {
        "endotracheal tube": 0.65,
        "enteric tube": 0.5,
        "central line": 0.7,
        "chest tube": 0.15,
        "sternal wires": 0.25,
        "ecg leads": 0.45,
    },
    "trauma": {"chest tube": 0.6, "endotracheal tube": 0.35, "central line": 0.3, "ecg leads": 0.35},
    "tumour": {"port": 0.8, "central line": 0.2},
    "chronic": {"pacemaker": 0.5, "sternal wires": 0.5, "port": 0.2},
}
LASTING_DEVICES = ("pacemaker", "port", "sternal wires")

# How often a report that finds nothing says so.
_DENIED: dict[str, float] = {
    "Enlarged Cardiomediastinum": 0.50,
    "Cardiomegaly": 0.60,
    "Lung Lesion": 0.12,
    "Lung Opacity": 0.40,
    "Edema": 0.35,
    "Consolidation": 0.55,
    "Pneumonia": 0.20,
    "Atelectasis": 0.05,
    "Pneumothorax": 0.75,
    "Pleural Effusion": 0.75,
    "Pleural Other": 0.07,
    "Fracture": 0.30,
    SUPPORT_DEVICES: 0.06,
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One observation of one study: what is drawn, and what the report makes of it."""

    name: str
    present: bool = False
    state: int | None = None
    """1, 0, -1 as the report states it, None where it says nothing."""
    side: str = ""
    """"left", "right", "bilateral" (as the patient has it), or empty."""
    zone: str = ""
    """"upper", "mid", "lower" third of the lung, or empty."""
    severity: int = 1
    """0 mild or small, 1 moderate, 2 severe or large."""
    kind: str = ""
    size_cm: float | None = None
    count: int = 1
    change: str = ""
    """Since the last study: "", "new", "unchanged", "worse", "better", "resolved"."""
    place: tuple[float, float] = (0.5, 0.5)
    """Where inside side and zone, as two numbers in [0, 1): the same in every study of a patient."""
    nonce: int = 0
    """Seed of its shape, the same in every study of a patient."""

    @property
    def strength(self) -> float:
        """How strongly it is drawn; what the report is unsure of is drawn faintly."""
        return 0.6 if self.state == UNCERTAIN else (0.95, 1.1, 1.25)[self.severity]

    @property
    def sides(self) -> tuple[str, ...]:
        return ("right", "left") if self.side == "bilateral" else (self.side,)


@dataclass(frozen=True)
class Device:
    """A tube, line or implant."""

    kind: str
    side: str
    nonce: int


@dataclass(frozen=True)
class Case:
    """One study before it is drawn and written."""

    age: int
    sex: str
    theme: str
    number: int
    """0 for the patient's first study."""
    view: str
    lateral: bool
    findings: dict[str, Finding] = field(default_factory=dict)
    devices: tuple[Device, ...] = ()

    def state(self, name: str) -> int | None:
        return self.findings[name].state


def first_case(rng: np.random.Generator) -> Case:
    """The first study of a patient."""
    theme = _theme(rng, _NORMAL_SHARE)
    age = int(np.clip(rng.normal(_AGE.get(theme, 62), 15), 19, 89))
    sex = "F" if rng.random() < 0.48 else "M"
    return _complete(rng, Case(age, sex, theme, 0, "PA", False), {}, ())


def next_case(rng: np.random.Generator, before: Case) -> Case:
    """A follow-up: chronic findings stay, acute ones grow, shrink, resolve or are joined by others."""
    theme = before.theme if rng.random() < 0.8 else _theme(rng, 0.3)
    kept: dict[str, Finding] = {}
    for name, old in before.findings.items():
        if not old.present or name == SUPPORT_DEVICES:
            continue
        chronic = name in CHRONIC
        if rng.random() < (0.05 if chronic else 0.35):
            change = "resolved" if old.state == PRESENT else ""
            kept[name] = Finding(name=name, state=ABSENT, side=old.side, zone=old.zone, kind=old.kind, change=change)
            continue
        kept[name] = _changed(rng, old)
    devices = tuple(d for d in before.devices if d.kind in LASTING_DEVICES or rng.random() < 0.75)
    return _complete(rng, Case(before.age, before.sex, theme, before.number + 1, "PA", False), kept, devices)


def _changed(rng: np.random.Generator, old: Finding) -> Finding:
    """A finding as a later study shows it."""
    if old.name == "Lung Lesion" and old.size_cm is not None:
        factor, change = ((0.75, "better"), (1.0, "unchanged"), (1.3, "worse"))[
            int(rng.choice(3, p=(0.15, 0.55, 0.30)))
        ]
        size = round(float(np.clip(old.size_cm * factor, 1.5, 6.0)), 1)
        kind = old.kind if old.count > 1 else "mass" if size > 3.0 else "nodule"
        change = change if size != old.size_cm else "unchanged"
        return replace(old, size_cm=size, kind=kind, change=change)
    step = 0 if old.name in CHRONIC else int(rng.choice((-1, 0, 1), p=(0.3, 0.4, 0.3)))
    severity = int(np.clip(old.severity + step, 0, 2))
    change = ("better", "unchanged", "worse")[1 + (severity > old.severity) - (severity < old.severity)]
    milder = {"tension": "", "volume loss": "plate"} if severity < 2 else {}
    return replace(old, severity=severity, change=change, kind=milder.get(old.kind, old.kind))


def _theme(rng: np.random.Generator, normal: float) -> str:
    weights = np.array([row[0] for row in _THEMES.values()])
    share = np.concatenate(([normal], (1 - normal) * weights / weights.sum()))
    return THEMES[int(rng.choice(len(THEMES), p=share))]


def _complete(rng: np.random.Generator, case: Case, kept: dict[str, Finding], devices: tuple[Device, ...]) -> Case:
    chances = dict(zip(NAMES, _THEMES[case.theme][1:], strict=True)) if case.theme != "normal" else {}
    if case.number and kept:
        chances = {name: 0.12 * chance for name, chance in chances.items()}  # most of it is there since the first study
    found = {name for name in NAMES if name != SUPPORT_DEVICES and rng.random() < chances.get(name, 0.0)} - set(kept)
    if chances and not found and not any(finding.present for finding in kept.values()):
        main = np.array([chances[name] if name != SUPPORT_DEVICES and name not in kept else 0.0 for name in NAMES])
        found = {NAMES[int(rng.choice(len(NAMES), p=main / main.sum()))]}
    findings = dict(kept)
    for name in NAMES:  # a fixed order: sets have none
        if name in found:
            findings[name] = _describe(rng, name, findings, change="new" if case.number else "")
    if not devices and rng.random() < {"normal": 0.06}.get(case.theme, chances.get(SUPPORT_DEVICES, 0.0)):
        devices = _devices(rng, case.theme, findings)
    if devices:
        findings[SUPPORT_DEVICES] = Finding(name=SUPPORT_DEVICES, present=True)
    sick = case.theme in ("intensive", "trauma") or any(d.kind == "endotracheal tube" for d in devices)
    chance_ap = 0.85 if sick else 0.15 if case.theme == "normal" else 0.35
    view = "AP" if rng.random() < chance_ap else "PA"
    case = replace(case, view=view, lateral=bool(view == "PA" and rng.random() < 0.40), devices=devices)
    return replace(case, findings=_stated(rng, case, findings))


def _stated(rng: np.random.Generator, case: Case, findings: dict[str, Finding]) -> dict[str, Finding]:
    """Decide for each observation what the report says of it."""
    stated: dict[str, Finding] = {}
    doubt = 0.012 if case.theme == "normal" else 0.036
    for name in NAMES:
        finding = findings.get(name)
        if finding is not None and finding.present:
            mild = finding.severity == 0 and name != SUPPORT_DEVICES
            chance = rng.random()
            if mild and chance < 0.12:
                finding = replace(finding, state=UNCERTAIN)
            elif mild and chance < 0.15:
                finding = replace(finding, state=None)
            else:
                finding = replace(finding, state=PRESENT)
        elif finding is not None:
            finding = replace(finding, state=ABSENT)
        elif rng.random() < doubt:
            # Half of what a report cannot exclude is there, faintly.
            doubtful = _describe(rng, name, findings, change="", severity=0)
            finding = replace(doubtful, present=bool(rng.random() < 0.5), state=UNCERTAIN)
        else:
            finding = Finding(name=name, state=ABSENT if rng.random() < _DENIED[name] else None)
        stated[name] = finding
    return stated


def _describe(
    rng: np.random.Generator, name: str, others: dict[str, Finding], change: str, severity: int | None = None
) -> Finding:
    """Side, zone, severity and kind of a new finding, in keeping with those that are already there."""
    if severity is None:
        severity = int(rng.choice(3, p=(0.35, 0.42, 0.23)))
    side = str(rng.choice(("left", "right", "bilateral"), p=(0.42, 0.42, 0.16)))
    zone = str(rng.choice(("upper", "mid", "lower"), p=(0.3, 0.25, 0.45)))
    place = (float(rng.random()), float(rng.random()))
    nonce, kind, size, count = int(rng.integers(2**31)), "", None, 1
    if name in ("Cardiomegaly", "Enlarged Cardiomediastinum"):
        side = zone = ""
        kind = "aorta" if name != "Cardiomegaly" and rng.random() < 0.4 else ""
    elif name == "Lung Lesion":
        side = str(rng.choice(("left", "right")))
        size = round(float((1.8, 2.4, 3.5)[severity] + (0.6, 1.0, 2.5)[severity] * rng.random()), 1)
        count = int(rng.integers(3, 7)) if rng.random() < 0.22 else 1
        kind = "mass" if size > 3.0 else "nodule"
        if count > 1:
            side, zone, kind, size = "bilateral", "", "nodules", min(size, 2.8)
    elif name == "Edema":
        side, zone, kind = "bilateral", "", "interstitial" if severity == 0 or rng.random() < 0.4 else "alveolar"
    elif name == "Consolidation":
        side = str(rng.choice(("left", "right")))
    elif name == "Pneumonia":
        partner = others.get("Consolidation")
        if partner is not None and partner.present and rng.random() < 0.8:
            side, zone = partner.side, partner.zone
    elif name == "Atelectasis":
        zone = "lower" if rng.random() < 0.85 else "mid"
        side = str(rng.choice(("left", "right", "bilateral"), p=(0.36, 0.34, 0.30)))
        kind = "volume loss" if severity == 2 and side != "bilateral" else "plate"
    elif name == "Pneumothorax":
        zone, side = "upper", str(rng.choice(("left", "right")))
        kind = "tension" if severity == 2 and rng.random() < 0.4 else ""
    elif name == "Pleural Effusion":
        both = 0.55 if "Edema" in others and others["Edema"].present else 0.25
        zone, partner = "lower", others.get("Atelectasis")
        side = "bilateral" if rng.random() < both else str(rng.choice(("left", "right")))
        if partner is not None and partner.present and rng.random() < 0.7:
            side = partner.side
    elif name == "Pleural Other":
        kind = str(rng.choice(("thickening", "apical cap", "plaque"), p=(0.45, 0.25, 0.30)))
        zone = {"thickening": "mid", "apical cap": "upper", "plaque": "mid"}[kind]
    elif name == "Fracture":
        kind = str(rng.choice(("rib", "ribs", "clavicle"), p=(0.40, 0.33, 0.27)))
        partner = others.get("Pneumothorax")
        side = partner.side if partner is not None and partner.present else str(rng.choice(("left", "right")))
        zone, count = ("upper" if kind == "clavicle" else "mid"), 2 if kind == "ribs" else 1
    elif name == SUPPORT_DEVICES:
        side, zone = str(rng.choice(("left", "right"))), ""
    return Finding(
        name=name,
        present=True,
        side=side,
        zone=zone,
        severity=severity,
        kind=kind,
        size_cm=size,
        count=count,
        change=change,
        place=place,
        nonce=nonce,
    )


def _devices(rng: np.random.Generator, theme: str, findings: dict[str, Finding]) -> tuple[Device, ...]:
    chances = _DEVICES[theme]
    kinds = [kind for kind, chance in chances.items() if rng.random() < chance]
    if not [kind for kind in kinds if kind != "ecg leads"] and rng.random() < 0.8:
        kinds.append(max(chances, key=lambda kind: chances[kind]))
    drained = [f.side for n, f in findings.items() if n in ("Pneumothorax", "Pleural Effusion") and f.present]
    devices = []
    for kind in kinds or ["central line"]:
        side = "left" if rng.random() < {"pacemaker": 0.85}.get(kind, 0.3) else "right"
        if kind == "chest tube" and drained and drained[0] in ("left", "right"):
            side = drained[0]
        devices.append(Device(kind, side, int(rng.integers(2**31))))
    return tuple(devices)
