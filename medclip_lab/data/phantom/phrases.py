"""The words for each finding: noun phrases and whole sentences, with side, size and severity filled in.

A noun phrase comes without its article and with its number: "s" takes a or an, "p" is plural, "m" takes no article.
The second part of a wording names what else it states: a report that says "opacity" states a lung opacity too, as the
CheXpert labeller reads it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medclip_lab.data.phantom.case import Device, Finding

OPACITY = {"Lung Opacity": 1}
_MILD = (("mild", "mild", "minimal", "slight"), ("moderate",), ("severe", "severe", "marked"))
_SMALL = (("small", "small", "trace", "tiny"), ("moderate", "moderate-sized"), ("large",))
_RIBS = {4: "fourth", 5: "fifth", 6: "sixth", 7: "seventh", 8: "eighth"}


@dataclass(frozen=True)
class Phrase:
    """A noun phrase without article, its number (s, p, m) and what it states besides its own finding."""

    noun: str
    number: str
    states: dict[str, int]

    @property
    def with_article(self) -> str:
        if self.number != "s":
            return self.noun
        return ("an " if self.noun[0] in "aeiou" else "a ") + self.noun

    @property
    def verb(self) -> str:
        return "are" if self.number == "p" else "is"


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """One of the wordings."""
    return items[int(rng.integers(len(items)))]


def lobe(finding: Finding) -> str:
    """Where it is, as a noun with article: "the right upper lobe", "both lung bases"."""
    side, zone = finding.side, finding.zone
    if side == "bilateral":
        return {"upper": "both upper lobes", "mid": "both mid lungs", "lower": "both lower lobes"}.get(
            zone, "both lungs"
        )
    if zone == "mid":
        return "the right middle lobe" if side == "right" else "the lingula"
    return f"the {side} {zone} lobe"


def region(finding: Finding) -> str:
    """Where it is, less exactly: "the left lung base", "the right mid lung"."""
    side, zone = finding.side, finding.zone
    if side == "bilateral":
        return {"upper": "both upper lungs", "mid": "both mid lungs", "lower": "both lung bases"}.get(
            zone, "both lungs"
        )
    return {"upper": f"the {side} upper lung", "mid": f"the {side} mid lung", "lower": f"the {side} lung base"}[zone]


def _adjective(finding: Finding) -> str:
    """As an adjective: "right upper lobe", "bibasilar"."""
    if finding.side == "bilateral":
        return {"upper": "bilateral upper lobe", "mid": "bilateral mid lung", "lower": "bibasilar"}[finding.zone]
    if finding.zone == "mid":
        return "right middle lobe" if finding.side == "right" else "lingular"
    return f"{finding.side} {finding.zone} lobe"


def _heart(f: Finding, r: np.random.Generator) -> Phrase:
    word = pick(r, _MILD[f.severity])
    noun = pick(r, ("cardiomegaly", "cardiomegaly", "cardiac enlargement", "enlargement of the cardiac silhouette"))
    return Phrase(f"{word} {noun}", "m", {})


def _mediastinum(f: Finding, r: np.random.Generator) -> Phrase:
    word = pick(r, _MILD[f.severity])
    nouns = ["widening of the mediastinum", "widening of the superior mediastinum", "mediastinal widening"]
    if f.kind == "aorta":
        nouns = [
            "enlargement of the mediastinal contour from a dilated aorta",
            "mediastinal widening with a tortuous aorta",
        ]
    return Phrase(f"{word} {pick(r, nouns)}", "m", {})


def _lesion(f: Finding, r: np.random.Generator) -> Phrase:
    size = f"{f.size_cm:.1f} cm"
    if f.count > 1:
        first = pick(r, ("multiple", "several", "numerous"))
        tail = pick(r, (f"measuring up to {size}", f"in both lungs, the largest {size}", "throughout both lungs"))
        return Phrase(f"{first} pulmonary nodules {tail}", "p", {})
    kind = f.kind
    if kind == "nodule" and r.random() < 0.12:
        return Phrase(f"{size} nodular opacity in {lobe(f)}", "s", OPACITY)
    nouns = [
        f"{size} {kind} in {lobe(f)}",
        f"{size} {_adjective(f)} {kind}",
        f"{pick(r, ('round', 'rounded', 'well-defined'))} {kind} in {region(f)} measuring {size}",
        f"{_adjective(f)} {'lung mass' if kind == 'mass' else 'pulmonary nodule'} measuring {size}",
        f"solitary {size} {kind} projecting over {region(f)}",
    ]
    return Phrase(pick(r, nouns), "s", {})


def _opacity(f: Finding, r: np.random.Generator) -> Phrase:
    word = pick(r, _MILD[f.severity])
    if f.side == "bilateral":
        kind = pick(r, ("hazy opacities", "ill-defined opacities", "ground-glass opacities"))
        return Phrase(f"{word} {kind} in {pick(r, (lobe(f), region(f)))}", "p", {})
    kind = pick(r, ("hazy opacity", "ill-defined opacity", "ground-glass opacity", "airspace opacity"))
    nouns = [f"{word} {kind} in {lobe(f)}", f"{kind} in {region(f)}", f"{word} {kind} projecting over {region(f)}"]
    return Phrase(pick(r, [*nouns, f"{_adjective(f)} {kind}"]), "s", {})


def _edema(f: Finding, r: np.random.Generator) -> Phrase:
    word = pick(r, _MILD[f.severity])
    if r.random() < 0.15:
        return Phrase(f"bilateral perihilar opacities consistent with {word} pulmonary edema", "p", OPACITY)
    kind = f"{word} interstitial edema" if f.kind == "interstitial" else f"{word} alveolar pulmonary edema"
    nouns = [
        kind,
        f"{word} pulmonary edema",
        f"{word} pulmonary edema",
        f"{word} pulmonary vascular congestion and edema",
    ]
    return Phrase(pick(r, [*nouns, f"indistinct vessels and septal lines compatible with {word} edema"]), "m", {})


def _consolidation(f: Finding, r: np.random.Generator) -> Phrase:
    dense = pick(r, (("patchy", "subtle"), ("focal", "airspace"), ("dense", "extensive"))[f.severity])
    if r.random() < 0.12:
        return Phrase(
            f"{dense} opacity in {lobe(f)} with air bronchograms, in keeping with consolidation", "s", OPACITY
        )
    nouns = [
        f"{dense} consolidation in {lobe(f)}",
        f"{_adjective(f)} consolidation",
        f"{dense} {_adjective(f)} consolidation with air bronchograms",
        f"{dense} consolidation of {lobe(f)}",
    ]
    return Phrase(pick(r, nouns), "m", {})


def _pneumonia(f: Finding, r: np.random.Generator) -> Phrase:
    many = f.side == "bilateral"
    if r.random() < 0.68:
        kind = pick(r, ("patchy", "heterogeneous", "patchy airspace"))
        tail = pick(r, ("consistent with pneumonia", "compatible with pneumonia", "in keeping with infection"))
        return Phrase(f"{kind} {'opacities' if many else 'opacity'} in {lobe(f)} {tail}", "p" if many else "s", OPACITY)
    if many:
        return Phrase(pick(r, ("multifocal pneumonia", "bilateral pneumonia", f"pneumonia in {lobe(f)}")), "m", {})
    nouns = [f"{_adjective(f)} pneumonia", f"pneumonia in {lobe(f)}", f"{_adjective(f)} bronchopneumonia"]
    return Phrase(pick(r, nouns), "m", {})


def _atelectasis(f: Finding, r: np.random.Generator) -> Phrase:
    word = pick(r, _MILD[f.severity])
    if r.random() < 0.08:
        return Phrase(f"linear opacities in {region(f)} compatible with atelectasis", "p", OPACITY)
    if f.kind == "volume loss":
        nouns = [f"{_adjective(f)} collapse with atelectasis", f"atelectasis of {lobe(f)} with volume loss"]
        return Phrase(pick(r, [*nouns, f"volume loss and {word} atelectasis in {region(f)}"]), "m", {})
    kind = pick(r, ("plate-like", "linear", "subsegmental", "bandlike", "discoid"))
    nouns = [
        f"{kind} atelectasis in {region(f)}",
        f"{word} atelectasis in {region(f)}",
        f"{word} {_adjective(f)} atelectasis",
    ]
    return Phrase(pick(r, nouns), "m", {})


def _pneumothorax(f: Finding, r: np.random.Generator) -> Phrase:
    size = pick(r, _SMALL[f.severity])
    if f.kind == "tension":
        tail = pick(r, ("with mediastinal shift", "with signs of tension"))
        return Phrase(f"large {f.side} pneumothorax {tail}", "s", {})
    apical = " apical" if f.severity == 0 and r.random() < 0.6 else ""
    sided = pick(r, (f.side, f"{f.side}-sided"))
    return Phrase(f"{size} {sided}{apical} pneumothorax", "s", {})


def _effusion(f: Finding, r: np.random.Generator) -> Phrase:
    size = pick(r, _SMALL[f.severity])
    if f.side == "bilateral":
        nouns = [
            f"{size} bilateral pleural effusions",
            f"bilateral {size} effusions",
            f"{size} pleural effusions on both sides",
        ]
        return Phrase(pick(r, nouns), "p", {})
    nouns = [
        f"{size} {f.side} pleural effusion",
        f"{size} {f.side}-sided effusion",
        f"{size} layering {f.side} pleural effusion",
    ]
    if f.severity == 0 and r.random() < 0.3:
        return Phrase(f"blunting of the {f.side} costophrenic angle from a {size} effusion", "m", {})
    return Phrase(pick(r, nouns), "s", {})


def _pleural(f: Finding, r: np.random.Generator) -> Phrase:
    word, both = pick(r, _MILD[f.severity]), f.side == "bilateral"
    if f.kind == "plaque":
        noun = pick(r, ("calcified pleural plaques", "pleural calcifications", "pleural plaques"))
        return Phrase(f"bilateral {noun}" if both else f"{noun} on the {f.side}", "p", {})
    if f.kind == "apical cap":
        noun = pick(r, ("apical pleural thickening", "apical pleural scarring", "apical pleural capping"))
        return Phrase(f"bi{noun}" if both else f"{word} {f.side} {noun}", "m", {})
    noun = pick(r, ("pleural thickening", "lateral pleural thickening", "pleural scarring"))
    return Phrase(f"{word} {f.side} {noun}", "m", {})


def _fracture(f: Finding, r: np.random.Generator) -> Phrase:
    age = pick(
        r, (("nondisplaced", "subtle"), ("displaced", "acute", "healing"), ("displaced", "comminuted"))[f.severity]
    )
    if f.kind == "clavicle":
        nouns = [f"{age} {f.side} clavicle fracture", f"{age} fracture of the {f.side} clavicle"]
        return Phrase(pick(r, nouns), "s", {})
    first = 4 + int(3 * f.place[1])
    if f.kind == "ribs":
        both = f"{_RIBS[first]} and {_RIBS[first + 1]} ribs"
        nouns = [
            f"{age} fractures of the {f.side} {both}",
            f"{age} {f.side} rib fractures",
            f"{f.side} lateral rib fractures",
        ]
        return Phrase(pick(r, nouns), "p", {})
    nouns = [f"{age} fracture of the {f.side} {_RIBS[first]} rib", f"{age} {f.side} rib fracture"]
    return Phrase(pick(r, nouns), "s", {})


def _line(f: Finding, r: np.random.Generator) -> Phrase:
    noun = pick(r, ("retained catheter fragment", "catheter", "indwelling line", "external support device"))
    return Phrase(f"{noun} projecting over the {f.side or 'right'} chest", "s", {})


NOUNS: dict[str, Callable[[Finding, np.random.Generator], Phrase]] = {
    "Enlarged Cardiomediastinum": _mediastinum,
    "Cardiomegaly": _heart,
    "Lung Lesion": _lesion,
    "Lung Opacity": _opacity,
    "Edema": _edema,
    "Consolidation": _consolidation,
    "Pneumonia": _pneumonia,
    "Atelectasis": _atelectasis,
    "Pneumothorax": _pneumothorax,
    "Pleural Effusion": _effusion,
    "Pleural Other": _pleural,
    "Fracture": _fracture,
    "Support Devices": _line,
}

# Short names for lists of what is not there.
DENIED: dict[str, tuple[str, ...]] = {
    "Lung Lesion": ("pulmonary nodule", "suspicious pulmonary nodule", "suspicious lung lesion"),
    "Lung Opacity": ("airspace opacity", "focal opacity", "parenchymal opacity"),
    "Edema": ("pulmonary edema", "overt pulmonary edema", "interstitial edema"),
    "Consolidation": ("consolidation", "focal consolidation", "lobar consolidation"),
    "Pneumonia": ("pneumonia", "pneumonia", "infectious process"),
    "Atelectasis": ("atelectasis", "significant atelectasis"),
    "Pneumothorax": ("pneumothorax",),
    "Pleural Effusion": ("pleural effusion", "effusion"),
    "Pleural Other": ("pleural thickening", "pleural plaque"),
    "Fracture": ("fracture", "acute fracture", "displaced rib fracture"),
    "Support Devices": ("support device", "indwelling line or tube"),
}


def device_sentence(device: Device, follow_up: bool, r: np.random.Generator) -> str:
    """A sentence on a device; only a follow-up can say that it is where it was."""
    side, cm = device.side, f"{2.5 + 3.5 * r.random():.1f} cm"
    news = ("is in place", "is noted", "is present")
    again = pick(r, ("is unchanged in position", "is again seen", *news) if follow_up else news)
    wordings: dict[str, tuple[str, ...]] = {
        "endotracheal tube": (
            f"Endotracheal tube terminates {cm} above the carina.",
            f"The tip of the endotracheal tube is {cm} above the carina.",
            f"An endotracheal tube {again}.",
        ),
        "enteric tube": (
            "Enteric tube courses below the diaphragm with its tip in the stomach.",
            "A nasogastric tube ends in the stomach.",
            f"A feeding tube {again}.",
        ),
        "central line": (
            f"{side.capitalize()} central venous catheter terminates in the superior vena cava.",
            f"A {side} internal jugular or PICC line ends at the cavoatrial junction.",
            f"A {side} central line {again}.",
        ),
        "port": (
            f"{side.capitalize()} chest port with its tip in the superior vena cava.",
            f"A {side}-sided port catheter {again}.",
        ),
        "pacemaker": (
            f"{side.capitalize()} chest wall pacemaker with leads in the right atrium and right ventricle.",
            f"A {side}-sided dual-lead pacemaker {again}.",
        ),
        "sternal wires": (
            "Median sternotomy wires are intact.",
            "Sternal wires from prior median sternotomy.",
            "Intact sternotomy wires are seen.",
        ),
        "chest tube": (
            f"{side.capitalize()} chest tube {again}.",
            f"A {side}-sided pleural drain {again}.",
        ),
        "ecg leads": (
            "ECG leads overlie the chest.",
            "External monitoring leads project over the thorax.",
        ),
    }
    return pick(r, wordings[device.kind])
