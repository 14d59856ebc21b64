"""Vocabulary of the labeller: what names a finding, an organ, its state and a normal study.

Terms are regular expressions over a lower-case sentence with single blanks. A term is added here; negations and doubts
stand in `label_cues`, the logic in `labeller`. The words are ours, for radiographs of the chest; the fourteen
observations are CheXpert's (Irvin et al., AAAI 2019).
"""

import re
from collections.abc import Iterable

from medclip_lab.data.findings import SUPPORT_DEVICES

EC, CM, LESION, OPACITY, EDEMA = "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema"
CONSOLIDATION, PNEUMONIA, ATELECTASIS, PNEUMOTHORAX = "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax"
EFFUSION, PLEURAL, FRACTURE = "Pleural Effusion", "Pleural Other", "Fracture"

HEDGED = "?"
"""Ends a label whose term is itself only a hint: what blunts a costophrenic angle may be fluid, or a scar."""

# ---------------------------------------------------------------------------------------------------------- mentions
_PLACE = (
    r"(?:bi-?basilar|basilar|basal|bases?|lobes?|retrocardiac|\w*hilar|lingular?|apical|apex|mid-?lung|lungs?|"
    r"costo-?phrenic)"
)
_VAGUE = (
    r"(?:increas\w+|ill[- ]defined|patchy|vague|streaky|linear|focal|alveolar|parenchymal|pulmonary|subtle|abnormal)"
)
_SULCUS = r"(?:costo-? ?(?:phrenic|diaphragmatic)(?: \w+)?|cp|sulc\w+)"
_ELSEWHERE = r"splenic|spleen|hepatic|liver|renal|kidney|adrenal|abdominal|abdomen|thyroid|breast|chest wall"
_OR_SCAR = r"(?: ?(?:and|or|/) ?scar\w*)?"
_HARDWARE = r"(?:sternotomy|wires?|leads?|catheters?|hardware|screws?|rods?|plates?)"

# Labels -> terms. The first entry that matches at a place wins. An entry without labels only keeps its words from the
# entries below it ("pericardial effusion" is no pleural effusion).
_MENTIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (),
        (
            r"peri-?cardial (?:or pleural )?(?:effusion|fluid)s?",
            r"(?:joint|knee|elbow) effusions?",
            r"mass effect|body mass|(?:nipple|skin) (?:shadow|fold)s?|nipple markers?|pleural (?:line|margin)s?",
            r"nodul\w+(?: \w+){0,9} (?:nipple|skin) (?:shadow|fold|marker)s?",  # what it is taken for and what it is
            r"(?:thoracic|chest|pleural|abdominal|peritoneal|oral|nasal) cavit(?:y|ies)",
            rf"(?:{_ELSEWHERE})(?: \w+)? (?:granuloma(?:s|ta)?|mass(?:es)?|nodules?|lesions?)",
            rf"(?:granuloma(?:s|ta)?|mass(?:es)?|nodules?|lesions?) (?:in|of|within) the (?:{_ELSEWHERE})\b",
            r"(?:bon[ye]|osseous|lytic|sclerotic|blastic|skeletal|ribs?|vertebral|skin)(?: \w+)?"
            r" (?:lesions?|mass(?:es)?)",
            r"(?:soft tissue|subcutaneous|chest wall|laryngeal|peripheral|cerebral) edema",
            r"vertebral (?:body )?collapse",
            r"(?:bon[ye]|osseous|calcific|calcified|metallic|metal|vascular|breast|soft tissue) densit(?:y|ies)",
            rf"fractur\w+ (?:of (?:the )?)?(?:\w+ ){{0,3}}?{_HARDWARE}\b",
            rf"{_HARDWARE} (?:(?:is|are|appears?) )?fractur\w+",
            r"granulomatous(?: \w+)?",
            r"(?:bilateral )?breast (?:prosthe\w+|implants?)",
            r"vascular engorgement(?= (?:appears?|is|are) within)",
        ),
    ),
    ((PNEUMOTHORAX, EFFUSION), (r"h(?:ydro|a?emo)-?pneumo-?thora(?:x|c)\w*",)),
    ((PNEUMOTHORAX,), (r"pneumo-? ?thora(?:x|c)\w*", r"ptx\b", r"pleural air\b")),
    ((EFFUSION,), (r"effusions?\b", r"pleural (?:fluid|collections?)", r"ha?emothora(?:x|c)\w*", r"empyemas?\b")),
    (
        (EFFUSION + HEDGED,),
        (
            rf"blunt(?:ing|ed)?\b(?: \w+){{0,5}}? (?:{_SULCUS}|angles?|pleural spaces?)\b",
            rf"{_SULCUS}\b(?: \w+){{0,5}}? blunt(?:ing|ed)",
        ),
    ),
    (
        (PLEURAL,),
        (
            r"pleuro-? ?parenchymal(?: \w+){0,2}? (?:scar\w*|thickening|fibrosis|disease|opacit\w+|changes?)",
            r"pleural?(?:[ /-]+(?:and|or|parenchymal|based|peripheral))*(?: \w+){0,2}?[ -]"
            rf"(?:thickening|scar\w*|plaques?|calcification\w*|fibrosis|capping){_OR_SCAR}",
            r"(?:thickening|scarring|plaques?|calcifications?) (?:of|in|along|involving)(?: the)?(?: \w+)?"
            r" (?:pleura|fissure)",
            rf"(?:fissur\w+|(?:bi-?)?apical)(?: \w+)? (?:cap(?:s|ping)?|thickening)\b{_OR_SCAR}",
            r"fibro-?thorax",
        ),
    ),
    (
        (ATELECTASIS,),
        (
            r"(?:micro-?)?atelecta\w+",
            r"volume loss|loss of (?:lung )?volume",
            r"(?:lobar|lobe|lung|segmental|pulmonary) collapse|collapsed? (?:of )?(?:the )?(?:\w+ ){0,2}?(?:lung|lobe)",
        ),
    ),
    ((CONSOLIDATION,), (r"consolidat\w+",)),
    (
        (PNEUMONIA,),
        (
            r"(?:broncho-?|pleuro-?)?pneumonias?\b",
            r"pneumonic\b",
            r"(?<!radiation )(?<!hypersensitivity )(?<!chemical )pneumonitis\b",
            r"(?:super)?infectio(?:ns?|us)\b",
        ),
    ),
    (
        (EDEMA,),
        (
            r"o?edema\w*",
            r"congesti\w+",
            r"(?:chf|(?:heart|cardiac|ventricular) (?:failure|decompensation))\b",
            r"(?:fluid|volume) overload",
            r"cephali[sz]ation",
            r"vascular (?:engorgement|redistribution|prominence|fullness|plethora)",
            r"pulmonary (?:veins|xxxx) (?:is|are|appears?|remains?) engorged",
            r"kerley\b|septal lines\b|b[- ]lines\b",
        ),
    ),
    (
        (LESION, OPACITY),
        (r"(?:fibro-?)?nodular(?:[ -]\w+)? (?:opaci\w+|infiltrat\w+)", r"mass-?like (?:\w+ )?opaci\w+"),
    ),
    (
        (LESION,),
        (
            r"(?:micro-?)?nodul(?:es?|arity)\b",
            r"nodular(?: \w+)? (?:densit(?:y|ies)|foc(?:us|i)|lesions?|areas?|shadows?|disease|structures?)",
            r"mass(?:es)?\b",
            r"granuloma(?:s|ta)?\b",
            r"(?:round(?:ed)?|ovoid|oval[- ]shaped)(?: area of)?(?: \w+)? densit(?:y|ies)",
            r"lesions?\b",
            r"(?:neoplas|metasta|malignan|tumou?r|carcinoma)\w*",
            r"(?:lung|pulmonary|bronchogenic) cancers?",
            r"cavit(?:y|ies|ary|ation)\b",
        ),
    ),
    (
        (OPACITY,),
        (
            r"opaci(?:t|f)\w+",
            r"infiltrat\w+",
            r"(?:air-? ?space|alveolar|parenchymal|interstitial(?: lung)?) (?:disease|process(?:es)?|filling)",
            r"(?:ground[- ]glass|haz(?:e|y|iness))\b(?:(?: \w+)? opaci\w+)?",
            r"(?:coarse\w*|increase[ds]?|prominen\w+|accentuated|chronic|abnormal|diffuse|thickened|scattered|irregular)"
            r"(?: \w+){0,4}? interstiti\w+(?: (?:lung )?(?:markings?|patterns?|changes?))?",
            r"(?:coarse\w*|increase[ds]?|prominen\w+|accentuated|abnormal)(?: \w+){0,3}?"
            r" (?:lung|pulmonary|parenchymal|bronchovascular) markings",
            r"interstitial (?:(?!o?edema)\w+ )?"
            r"(?:prominence|thickening|accentuation|coarsening|fibrosis|patterns?|changes?|abnormalit\w+)",
            r"(?:interstitial|pulmonary|lung|parenchymal) markings (?:\w+ ){0,4}?"
            r"(?:prominent|increased|coarse\w*|accentuated|thickened)",
            r"reticul(?:ation\w*|ar|o-?nodular)\b",
            r"(?:scar(?:s|ring|red)?|cicatri\w+)\b",
            rf"(?:{_VAGUE}|{_PLACE})(?: (?!nodular|round|oval|ovoid|calcif|bon|soft|metal)\w+){{0,2}}?"
            r" densit(?:y|ies)",
            rf"densit(?:y|ies),? (?:\w+ ){{0,5}}?{_PLACE}\b",
        ),
    ),
    ((CM,), (r"cardiomegaly",)),
    ((EC,), (r"mediastinal (?:mass|hematoma|fullness)\b",)),
    ((FRACTURE,), (r"fractur\w*", r"fx\b")),
    (
        (SUPPORT_DEVICES,),
        (
            r"(?:pace-?makers?|pacers?|pacing|a?icds?|defibrillators?|(?:neuro-?)?stimulators?)\b",
            r"(?:devices?|generators?)\b",
            r"leads?\b(?! to)",
            r"(?:catheters?|cannulas?|piccs?|tub(?:es?|ing)|tracheostomy|ett|ngt|swan[- ]ganz|drains?)\b",
            r"tips\b(?= (?:shunt|stent|noted|visuali[sz]ed))",  # the hepatic shunt, not the ends of a catheter
            r"(?:central|picc|venous|arterial|subclavian|jugular|dialysis|femoral|ij|midline|support|indwelling)"
            r"(?: venous| access)? lines?\b|lines and tubes",
            r"(?:port-?a-?cath|portacath|med-?i-?port)s?",
            r"(?:chest|chest wall|infusion|subclavian|jugular|power|access)[- ]ports?\b",
            r"(?:ivc|surgical) xxxx\b",  # the filter, the clips
            r"(?:sternotomy|wires?|sutures?|clips?|staples?|stents?|endografts?|hardware|screws?|rods?|occluder)\b",
            r"plates?\b(?![- ]?like)|instrumentation\b|(?:bone|suture) anchors?",
            r"(?:prosthe|arthroplast|annuloplast|valvuloplast)\w*",
            r"(?:mechanical|artificial|porcine|replaced)(?: \w+){0,2}? valves?",
            r"val(?:ve|vular) (?:replacements?|repairs?)",
            r"(?:shoulder|joint|hip) replacements?",
            r"(?:internal|anterior|posterior|plate|rod|screw) fixation",
            r"(?<!congenital )(?:spine|spinal|anterior|posterior|cervical|lumbar|thoracic|interbody) fusion",
            r"(?:ivc|caval?) filter|(?:embolization )?coils\b|lap[- ]?band|gastric band|(?:infusion|balloon) pump",
            r"(?:loop|event) recorders?",
            # De-identification often takes the name of the catheter and leaves where its tip lies.
            r"(?:tip|terminat\w+)\b(?: \w+){0,7}? "
            r"(?:svc|superior (?:vena cava|xxxx)|cavo-?atrial|caval atrial|right atri(?:um|al)|atriocaval|carina)\b",
        ),
    ),
)


def _any(terms: Iterable[str]) -> str:
    return "|".join(f"(?:{term})" for term in terms)


def named(groups: dict[str, str]) -> re.Pattern[str]:
    """One pattern whose `lastgroup` tells which of the groups matched; words are matched from their start."""
    return re.compile(
        r"(?:(?<![^\W_])|(?![a-z]))(?:" + "|".join(f"(?P<{name}>{terms})" for name, terms in groups.items()) + ")"
    )


MENTION = named({f"m{number}": _any(terms) for number, (_, terms) in enumerate(_MENTIONS)})
LABELS_OF = {f"m{number}": labels for number, (labels, _) in enumerate(_MENTIONS)}

# ---------------------------------------------------------------------------------------------- organs and their state
# Organs whose state an adjective tells ("the heart is enlarged", "normal mediastinum"). "other" are those that take an
# adjective away from the ones we label: "the aorta is enlarged", "enlarged lymph nodes", "normal lung volumes".
ORGAN = named(
    {
        "other": r"aort\w+|hil(?:um|a|ar)\b|trachea\w*|(?:hemi)?diaphragms?|abdomen|spine|soft tissues|"
        r"(?:lung )?volumes?|"
        r"(?:right|left) (?:\w+ )?(?:lung|heart)\b|(?:pulmonary|central) arter\w+|lymph nodes?|azygos|atri(?:um|al)|"
        r"(?:\w+ )?ventric\w+|airways?|thyroid|stomach|epicardial|pulmonary outflow|"
        r"mediastin\w+ (?:clips?|wires?|drains?|(?:and \w+ )?lymph\w*|nodes?|adenopathy|mass\w*|surgical)|"
        r"cardiac (?:pac\w+|device|leads?|defib\w+|monitor\w*|stents?|valve|surgery|cath\w*|margin|apex|generator|"
        r"aneurysm)",
        "cardiomediastinum": r"cardio-? ?mediastin\w+",
        "heart": r"heart\b(?! failure)|cardiac\b(?! (?:failure|decomp|congest|and pulmonary disease|disease))",
        "mediastinum": r"mediastin(?:um|al)",
        "vessels": r"(?:pulmonary |lung )?vascul(?:ar|arity|ature|aturity)\b|(?:pulmonary )?vessels",
        "lungs": r"lungs\b|lung (?:fields?|parenchyma|zones?|xxxx)\b|pulmonary parenchyma",
        "pleura": r"pleural (?:spaces?|surfaces?|cavit\w+)\b|pleura\b",
        "sulci": r"costo-? ?(?:phrenic|diaphragmatic)\b|sulci\b",
        "bones": r"(?:osseous|bony|skeletal|bone)(?: (?:structures?|thorax|skeleton|elements))?\b|bones|skeleton|"
        r"rib cage|ribs\b|thoracic cage",
    }
)
STATE = named(
    {
        "normal": r"(?:(?:upper|top|high)(?:[- ](?:limits?|range))?(?:[- ]of)?(?:[- ]the)?[- ]normal|normal|"
        r"unremarkable|within (?:the )?(?:normal )?(?:limits?|range)(?: of normal)?|non-?enlarged)\b",
        "borderline": r"borderline(?: enlarged| prominent| size)?\b",
        "enlarged": r"(?:enlarge(?:d|ment)|widen(?:ed|ing)|increased in size)\b|"
        r"large\b(?=[.,;]|$| (?:heart|cardiac|in size|and|but)\b)",  # as a predicate, or right before the heart
        "prominent": r"prominen(?:t|ce)\b",
        "congested": r"(?:engorged|engorgement(?! (?:appears?|is|are) within)|congested|indistinct(?:ness)?|"
        r"accentuat(?:ed|ion)|increased)\b",
        "clear": r"(?:clear|sharp|preserved)\b(?! (?:of|from|that|interval|change|increase|evidence))",
        "intact": r"intact\b",
        # A state that labels nothing and takes its organ away from an adjective that follows about something else.
        "neutral": r"(?:(?:hyper|hypo|under|over|well[- ]|normally )?-?(?:expanded|inflated|aerated|lucent)|stable|"
        r"unchanged|tortuous|low|similar|obscured|limited|midline|degenerative|calcified)\b",
    }
)
# What the normality of an organ denies.
ABSENT_IF_NORMAL: dict[str, tuple[str, ...]] = {
    "cardiomediastinum": (EC, CM),  # the whole is normal, so its part is
    "heart": (CM,),
    "mediastinum": (EC,),
    "vessels": (EDEMA,),  # congestion of the vessels counts as edema
    "lungs": (OPACITY, CONSOLIDATION),
    "pleura": (EFFUSION, PNEUMOTHORAX),
    "sulci": (EFFUSION,),
    "bones": (FRACTURE,),
}
# The adjectives that say normality, and the organs they can say it of: lungs are clear, bones are intact.
NORMAL_STATES: dict[str, frozenset[str]] = {
    "normal": frozenset(ABSENT_IF_NORMAL),
    "clear": frozenset({"lungs", "pleura", "sulci", "cardiomediastinum"}),
    "intact": frozenset({"bones"}),
}
PRESENT_IF: dict[tuple[str, str], tuple[str, ...]] = {
    ("enlarged", "heart"): (CM,),
    ("enlarged", "mediastinum"): (EC,),
    ("enlarged", "cardiomediastinum"): (EC, CM + HEDGED),  # the heart is the likeliest part of it to be large
    ("borderline", "heart"): (CM + HEDGED,),
    ("borderline", "cardiomediastinum"): (EC + HEDGED,),
    ("prominent", "heart"): (CM + HEDGED,),
    ("prominent", "mediastinum"): (EC,),
    ("prominent", "cardiomediastinum"): (EC,),
    ("prominent", "vessels"): (EDEMA,),
    ("congested", "vessels"): (EDEMA,),
}

# --------------------------------------------------------------------------------------------------- global normality
_CHEST_SITE = (
    r"cardio-? ?pulmonary|cardiac|pulmonary|cardio-? ?thoracic|intra-?thoracic|thoracic|chest|lungs?|pleural|"
    r"cardiovascular|radio(?:graph|log)ic(?:al)?|preoperative|traumatic"
)
_BONE_SITE = r"bon[ey]|osseous|skeletal|ribs?"
_ALSO = r",? ?(?:and|or|/)? ?"
NO_ABNORMALITY = re.compile(
    r"\b(?:no|without|negative for|free of|clear of)\b"
    r"(?: (?:evidence|signs?|of|for|any|an?|convincing|definite|typical|radiographic|radiological|plain|film|obvious|"
    r"visible|identifiable|demonstrable|appreciable|demonstration|suspicious|xxxx|specific))*"
    rf"(?:{_ALSO}(?:acute|active|subacute|chronic|significant|focal|gross|new))*"
    rf"(?P<site>(?:{_ALSO}(?:{_CHEST_SITE}|{_BONE_SITE}|soft tissue|acute|active))*)"
    r" (?:abnormalit(?:y|ies)|disease|disorders?|process(?:es)?|findings?|patholog(?:y|ies)|"
    rf"(?:{_BONE_SITE}) changes)\b"
    r"(?! (?:of(?! the (?:chest|thorax))|to suggest|suggest\w*|suspicious|concerning|for|consistent|that)\b)"
)
CHEST_SITE = re.compile(rf"\b(?:{_CHEST_SITE})\b")
BONE_SITE = re.compile(rf"\b(?:{_BONE_SITE})\b")
NORMAL_STUDY = re.compile(
    r"\b(?:normal|negative|unremarkable|clear)(?: (?:frontal|lateral|pa|ap|portable|two|2|views?|and|appear\w+|single|"
    r"examination|exam|study|of|the|x-?ray|radiographs?))* chest\b(?! (?:wall|tube|port))"
    r"|\b(?:chest|study|exam(?:ination)?|radiographs?|films?)"
    r"(?: (?:x-?(?:ray|xxxx)|radiographs?|film|exam\w*|is|are|appears?|within|the|grossly))*"
    r" (?:normal|negative|unremarkable)\b(?! (?:for|size|heart|card|lung|pulm|media))"
    r"|\b(?:normal|negative|unremarkable) (?:\w+ )?(?:study|exam(?:ination)?|radiographs?|x-?rays?|films?)\b"
    r"|^(?:normal|negative|unremarkable)[ .]*$"
)

ABNORMAL_STUDY = re.compile(
    r"(?<!no )(?<!not )\babnormal (?:\w+ )?(?:chest(?! wall)|study|exam(?:ination)?|radiographs?|x-?rays?|films?)\b"
)
DOUBT_BEFORE = re.compile(r"\b(?:probabl[ey]|likely|possibl[ey]|presumabl[ey]|questionabl[ey])(?: \w+)? $")
