"""Vocabulary of the labeller: what names a finding, an organ and its state, a negation, a doubt, and MeSH terms.

Terms are regular expressions over a lower-case sentence with single blanks. A term is added here; the logic stands in
`labeller`. The words are ours, for radiographs of the chest. The ideas are known: cues with a scope are NegEx's
(Chapman et al., J Biomed Inform 2001), the fourteen observations CheXpert's (Irvin et al., AAAI 2019).
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
_PLACE = r"(?:bi-?basilar|basilar|basal|bases?|lobes?|retrocardiac|\w*hilar|lingular?|apical|apex|mid-?lung|lungs?)"
_VAGUE = (
    r"(?:increas\w+|ill[- ]defined|patchy|vague|streaky|linear|focal|alveolar|parenchymal|pulmonary|subtle|abnormal)"
)
_SULCUS = r"(?:costo-? ?(?:phrenic|diaphragmatic)(?: \w+)?|cp|sulc\w+)"
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
            r"(?:thickening|scar\w*|plaques?|calcification\w*|fibrosis|capping)",
            r"(?:thickening|scarring|plaques?|calcifications?) (?:of|in|along|involving)(?: the)?(?: \w+)?"
            r" (?:pleura|fissure)",
            r"(?:fissur\w+|(?:bi-?)?apical) (?:cap(?:s|ping)?|thickening)\b",
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
    ((PNEUMONIA,), (r"(?:broncho-?|pleuro-?)?pneumonias?\b", r"pneumonic\b", r"(?:super)?infectio(?:ns?|us)\b")),
    (
        (EDEMA,),
        (
            r"o?edema\w*",
            r"congesti\w+",
            r"(?:chf|(?:heart|cardiac|ventricular) (?:failure|decompensation))\b",
            r"(?:fluid|volume) overload",
            r"cephali[sz]ation",
            r"vascular (?:engorgement|redistribution|prominence|fullness|plethora)",
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
            r"interstitial (?:\w+ )?"
            r"(?:prominence|thickening|accentuation|coarsening|fibrosis|patterns?|changes?|abnormalit\w+)",
            r"(?:interstitial|pulmonary|lung|parenchymal) markings (?:\w+ ){0,4}?"
            r"(?:prominent|increased|coarse\w*|accentuated|thickened)",
            r"reticul(?:ation\w*|ar|o-?nodular)\b",
            r"(?:scar(?:s|ring|red)?|cicatri\w+)\b",
            rf"(?:{_VAGUE}|{_PLACE})(?: (?!nodular|round|oval|ovoid|calcif|bon|soft|metal)\w+){{0,2}}?"
            r" densit(?:y|ies)",
            rf"densit(?:y|ies) (?:\w+ ){{0,5}}?{_PLACE}\b",
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


def _named(groups: dict[str, str]) -> re.Pattern[str]:
    """One pattern whose `lastgroup` tells which of the groups matched; words are matched from their start."""
    return re.compile(
        r"(?:(?<![^\W_])|(?![a-z]))(?:" + "|".join(f"(?P<{name}>{terms})" for name, terms in groups.items()) + ")"
    )


MENTION = _named({f"m{number}": _any(terms) for number, (_, terms) in enumerate(_MENTIONS)})
LABELS_OF = {f"m{number}": labels for number, (labels, _) in enumerate(_MENTIONS)}

# ---------------------------------------------------------------------------------------------- organs and their state
# Organs whose state an adjective tells ("the heart is enlarged", "normal mediastinum"). "other" are those that take an
# adjective away from the ones we label: "the aorta is enlarged", "enlarged lymph nodes", "normal lung volumes".
ORGAN = _named(
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
STATE = _named(
    {
        "normal": r"(?:(?:upper|top|high)(?:[- ](?:limits?|range))?(?:[- ]of)?(?:[- ]the)?[- ]normal|normal|"
        r"unremarkable|within (?:the )?(?:normal )?(?:limits?|range)(?: of normal)?|non-?enlarged)\b",
        "borderline": r"borderline(?: enlarged| prominent| size)?\b",
        "enlarged": r"(?:enlarge(?:d|ment)|widen(?:ed|ing)|increased in size)\b",
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
    r"(?! (?:of|to suggest|suggest\w*|suspicious|concerning|for|consistent|that)\b)"
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

# ---------------------------------------------------------------------------------------------------------------- cues
_DEGREE = (
    r"(?:significant(?:ly)? |interval |appreciabl[ey] |definitel?y? |acute(?:ly)? |obvious(?:ly)? |substantial(?:ly)? |"
    r"marked(?:ly)? |xxxx |radiographic(?:ally)? |clearly |well[ -])*"
)
_SEEN = (
    r"(?:seen|identified|visuali[sz]ed|evident|present|apparent|appreciated|demonstrated|noted|observed|detected|found|"
    r"visible|shown|suspected)"
)
_NOT_EXCLUDED = (
    r"(?:can ?not|could not|can't|not|difficult to|unable to)"
    r"(?: (?:be|entirely|completely|fully|confidently|definitely|reliably|totally|absolutely))* "
    r"(?:exclude[ds]?|ruled? ?-?out)"
)
# Tried in this order. "..._post" speak of the mentions before them, the others of those that follow.
CUE = _named(
    {
        # Words that look like a negation and are none.
        "pseudo": rf"(?:no|without|not)(?: evidence of| any)? {_DEGREE}(?:chang\w+|worse\w*|increas\w+|decreas\w+|"
        r"improv\w+|progress\w+|difference|enlargement of (?:the )?(?!heart|cardi|medias))\b|not only\b|gram negative",
        "skip_post": r"(?:may|might|could|can) not (?:be )?(?:well )?"
        r"(?:demonstrated|visuali[sz]ed|detected|seen|visible|evident)",
        "unsure_post": r"(?:is|are|remains?|be) (?:also )?"
        r"(?:possible|suspected|questioned|considered|likely|probable|equivocal|unlikely|less likely)\b"
        r"|(?:should|could|can) be considered|(?:is|are) (?:a possibility|a consideration|in the differential)"
        rf"|{_NOT_EXCLUDED}(?=[.,; ]*$| (?:on|at|by|in|given|with\w*|clinically|entirely|completely)\b)"
        r"|(?:less likely|unlikely)\b(?=[ .,]*$)",
        "no_post": r"(?:is|are|was|were|has|have)(?: been)? (?:now )?(?:completely |totally |essentially |since )?"
        r"(?:resolved|cleared|removed|absent|ruled out|excluded|gone)\b"
        rf"|(?:not|no longer) {_DEGREE}{_SEEN}\b|: (?:none|no|absent|negative)\b|resolved(?=[ .]*$)",
        "unsure_list": r"differential",
        "unsure": rf"{_NOT_EXCLUDED}|may\b|might\b|could\b|can be\b|possib(?:le|ly|ility)|probabl[ey]|potential(?:ly)?|"
        r"likely|presum\w+|perhaps|suspected|suspect\b|suspicio(?:n|us) (?:for|of)|question(?:able|ed)?\b|equivocal|"
        r"suggest\w*|concern\w* (?:for|of|about)|worr(?:y|isome) (?:for|about)|favor\w*|borderline|\? ?|"
        r"xxxx (?:to )?(?:represent|reflect|secondary|due|related)\w*|(?:most|more|less) xxxx|indeterminate|unclear",
        "versus": r"versus\b|vs\b\.?",
        # What is asked, planned or past tells nothing of this image.
        "skip": r"(?:history|hx) of|h/o|(?:rule|r)[ /-]?(?:out|o)\b|(?:may|could) obscure|"
        r"to (?:\w+ )?(?:exclude|evaluate|assess|identify)(?: for)?|"
        r"(?:evaluat\w+|assess\w*|look|looking|search|screening|workup)(?: for| of)|exclude\b|"
        r"(?:ensure|document|confirm|show|demonstrate|assess|until|to) (?:complete )?(?:resolution|clearing)(?: of)?|"
        r"if\b(?: there (?:is|are))?|no (?:other|additional|further)\b|please note",
        "no": r"(?:interval |complete )*(?<!near )(?<!near-)(?<!partial )(?<!near complete )(?<!near-complete )"
        r"(?<!incomplete )(?:resolution|clearing|removal) of|(?<!not )(?<!partially )(?<!incompletely )resolved|no\b|"
        r"not\b|without\b|none\b|negative for|(?:free|clear) (?:of|from)|absen(?:t|ce)(?: of)?|lack of|neither|nor\b",
        "end": r";|:|\. | - |–|—|but\b|however|(?:al)?though\b|except(?:ing)?\b|apart from|aside from|other than|"
        r"besides|otherwise|while\b|whereas|yet\b|despite|(?<!consistent )(?<!compatible )(?<!associated )(?<!keeping )"
        r"with\b|which\b|still\b|there (?:is|are)\b|again\b",
    }
)

# A verb after the last comma or "and" starts a clause of its own, in which the cue before it does not hold; so does an
# adjective that only a finding that is there can have.
VERB = re.compile(r"\b(?:is|are|was|were|has|have|had|appears?|remains?|shows?|demonstrates?)\b")
FRESH_START = re.compile(
    r" ?(?:there|the|an?|stable|unchanged|mild\w*|moderate\w*|severe\w*|marked\w*|minimal\w*|slight\w*|small|tiny|"
    r"trace|persistent|continued|interval|increas\w+|decreas\w+|improv\w+|worsen\w+|new|chronic|old|prior|healed|"
    r"calcified|low|status|prominent|tortuous|atherosclerotic|degenerative|emphysem\w+|enlarged|borderline|normal|"
    r"possible|probable|likely|(?P<side>left|right|bilateral|bi-?basilar))\b"
)
# Between two mentions that are alternatives ("atelectasis or infiltrate", "scarring/atelectasis"), or in one list.
CHOICE = re.compile(r" ?/ ?|[ ,]*(?:\w+ ){0,3}?(?:(?:and/)?or|versus|vs\.?|/)(?: ?[\w-]+(?: [\w-]+){0,3}?)? ?")
LISTED = re.compile(r" ?(?:,? ?(?P<joint>and/or|and|or|nor|/)|,) ?(?:(?!with|but)[\w-]+ ){0,4}?")

# ---------------------------------------------------------------------------------------------------------------- MeSH
_ELSEWHERE = (
    r"(?!.*/(?:abdomen|breast|neck|shoulder|spine|ribs?|thoracic vertebrae|humerus|clavicle|sternum|mediastinum|aorta|"
    r"skin))"
)
_MESH: tuple[tuple[tuple[str, ...], str], ...] = (
    ((CM,), r"cardiomegaly|(?:cardiac shadow|heart)/.*(?:enlarged|borderline)"),
    ((EC,), r"mediastinum/(?!.*(?:lymph nodes|blood vessels)).*(?:prominent|enlarged)"),
    (
        (EFFUSION,),
        r"pleural effusion|(?:costophrenic angle|sulcus|pleura)/.*blunted|h(?:ydro|emo)pneumothorax|hemothorax",
    ),
    ((PNEUMOTHORAX,), r"(?:hydro|hemo)?pneumothorax"),
    ((ATELECTASIS,), r"(?:pulmonary )?atelectasis|volume loss"),
    ((CONSOLIDATION,), r"consolidation"),
    ((PNEUMONIA,), r"pneumonia\b"),
    ((EDEMA,), r"pulmonary edema|pulmonary congestion|heart failure"),
    (
        (LESION,),
        rf"{_ELSEWHERE}(?:nodule|mass\b|(?:calcified )?granuloma\b|neoplasm|cavitation|(?:density|opacity)/.*round)",
    ),
    ((OPACITY,), rf"{_ELSEWHERE}(?:opacity|infiltrate|airspace disease|lung diseases, interstitial)"),
    ((OPACITY,), rf"{_ELSEWHERE}density/(?!.*round)(?:lung|retrocardiac|right|left|costophrenic)"),
    ((OPACITY,), r"markings/.*interstitial|cicatrix(?!.*/(?:pleura|breast|ribs))"),
    ((PLEURAL,), r"(?:thickening|cicatrix|calcinosis)/.*pleura"),
    ((FRACTURE,), r"fractures, bone"),
    ((SUPPORT_DEVICES,), r"catheters, indwelling|implanted medical device|medical device|surgical instruments"),
    ((SUPPORT_DEVICES,), r"tube, inserted|stents|sutures|spinal fusion"),
)
MESH = tuple((re.compile(pattern), labels) for labels, pattern in _MESH)
MESH_SILENT = ("no indexing", "technical quality of image unsatisfactory")
"""Terms that say nothing of the chest."""
