"""Vocabulary of the labeller: what names a finding, an organ, a state of an organ, a negation, a doubt.

Terms are regular expressions over a lower-case sentence with single blanks; a term is added here, the logic stands in
`labeller`. The words are ours, chosen for radiographs of the chest. The ideas are known: cues with a scope are NegEx's
(Chapman et al., J Biomed Inform 2001), the fourteen observations CheXpert's (Irvin et al., AAAI 2019).
"""

import re
from collections.abc import Iterable

from medclip_lab.data.findings import NO_FINDING, SUPPORT_DEVICES

EC, CM, LESION, OPACITY, EDEMA = "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema"
CONSOLIDATION, PNEUMONIA, ATELECTASIS, PNEUMOTHORAX = "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax"
EFFUSION, PLEURAL, FRACTURE = "Pleural Effusion", "Pleural Other", "Fracture"

HEDGED = "?"
"""Appended to a label whose term is itself no more than a hint: blunting of a costophrenic angle may be fluid."""

# ---------------------------------------------------------------------------------------------------------- mentions
# Labels -> terms. The first entry that matches at a place wins; an entry without labels only keeps its words from the
# entries below it ("pericardial effusion" is no pleural effusion).
_MENTIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (),
        (
            r"peri-?cardial (?:or pleural )?(?:effusion|fluid)s?",
            r"(?:joint|knee|elbow) effusions?",
            r"(?:mass effect|body mass|(?:nipple|skin) (?:shadow|fold)s?|pleural (?:line|margin)s?)",
            r"(?:bon[ye]|osseous|lytic|sclerotic|blastic|skeletal|ribs?|vertebral|cutaneous|skin)(?: \w+){0,2}? (?:lesions?|mass(?:es)?)",
            r"(?:soft tissue|subcutaneous|chest wall|laryngeal|peripheral|cerebral) edema",
            r"vertebral (?:body )?collapse",
            r"(?:bone?y?|osseous|calcific|calcified|metallic|metal|vascular|breast|soft tissue|xxxx mineral) densit(?:y|ies)",
            r"(?:fractur\w+ (?:of )?(?:the )?(?:\w+ ){0,2}|intact )(?:sternotomy|wires?|leads?|hardware)(?= (?:is|are) (?:fractured|broken))",
            r"(?:post-?|prior |previous )pneumon(?:ia|ic)\w*",
            r"aort\w+ (?:stent|valv)\w* calcifi\w+",
            r"foreign bod(?:y|ies)",
        ),
    ),
    ((PNEUMOTHORAX, EFFUSION), (r"hydro-?pneumo-?thora(?:x|c)\w*", r"ha?emo-?pneumo-?thora(?:x|c)\w*")),
    ((PNEUMOTHORAX,), (r"pneumo-? ?thora(?:x|c)\w*", r"ptx\b", r"pleural air\b(?: collections?)?")),
    ((EFFUSION,), (r"effusions?\b", r"pleural (?:fluid|(?:fluid )?collections?)", r"ha?emothora(?:x|c)\w*", r"empyemas?\b")),
    (
        (EFFUSION + HEDGED,),
        (
            r"blunt(?:ing|ed)?\b(?: \w+){0,5}? (?:costo-? ?(?:phrenic|diaphragmatic)|cp|sulc\w+|angles?|pleural spaces?)\b",
            r"(?:costo-? ?(?:phrenic|diaphragmatic)|cp|sulc\w+)\b(?: \w+){0,5}? blunt(?:ing|ed)",
        ),
    ),
    (
        (PLEURAL,),
        (
            r"pleuro-? ?parenchymal(?: \w+){0,2}? (?:scar\w*|thickening|fibrosis|disease|opacit\w+|changes?)",
            r"pleural?(?:[ -/]*(?:and|or|parenchymal))*(?: \w+){0,2}? (?:thickening|scar\w*|plaques?|calcification\w*|fibrosis)",
            r"(?:thickening|scarring|plaques?|calcifications?) (?:of|in|along|involving)(?: the)?(?: \w+)? pleura",
            r"(?:bi-?)?apical (?:cap(?:s|ping)?|thickening)\b",
            r"fibro-?thorax",
        ),
    ),
    (
        (ATELECTASIS,),
        (
            r"(?:micro-?)?atelecta\w+",
            r"volume loss",
            r"loss of (?:lung )?volume",
            r"(?:lobar|lobe|lung|segmental|pulmonary) collapse",
            r"collapsed? (?:of )?(?:the )?(?:\w+ ){0,2}?(?:lung|lobe)",
        ),
    ),
    ((CONSOLIDATION,), (r"consolidat\w+",)),
    ((PNEUMONIA,), (r"(?:broncho-?|pleuro-?)?pneumonias?\b", r"pneumonic\b", r"infectio(?:n|ns|us)\b", r"superinfection")),
    (
        (EDEMA,),
        (
            r"o?edema\w*",
            r"congesti\w+",
            r"(?:chf|(?:heart|cardiac|ventricular) (?:failure|decompensation))\b",
            r"(?:fluid|volume) overload",
            r"cephali[sz]ation",
            r"vascular (?:engorgement|redistribution|prominence|fullness|plethora)",
            r"(?:kerley|b[- ]lines|septal lines)\b",
        ),
    ),
    ((LESION, OPACITY), (r"(?:fibro-?)?nodular(?:[ -]\w+)? (?:opaci\w+|infiltrat\w+)", r"mass-?like (?:\w+ )?(?:opaci\w+|consolidation)")),
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
            r"ground[- ]glass",
            r"haz(?:e|y|iness)\b",
            r"(?:coarse\w*|increase[ds]?|prominen\w+|accentuated|chronic|abnormal|diffuse|thickened|scattered|irregular)(?: \w+){0,4}? interstiti\w+(?: (?:lung )?(?:markings?|patterns?|changes?))?",
            r"(?:coarse\w*|increase[ds]?|prominen\w+|accentuated|abnormal)(?: \w+){0,3}? (?:lung|pulmonary|parenchymal|bronchovascular) markings",
            r"interstitial (?:\w+ )?(?:prominence|thickening|accentuation|coarsening|fibrosis|patterns?|changes?|abnormalit\w+)",
            r"(?:interstitial|pulmonary|lung|parenchymal) markings (?:\w+ ){0,4}?(?:prominent|increased|coarse\w*|accentuated|thickened)",
            r"reticul(?:ation\w*|ar|onodular)\b",
            r"(?:scar(?:s|ring|red)?|cicatri\w+)\b",
            r"(?:increas\w+|ill[- ]defined|patchy|vague|streaky|linear|focal|alveolar|parenchymal|pulmonary|lungs?|bi-?basilar|basilar|basal|base|lobe|retrocardiac|\w*hilar|lingular?|apical|apex|subtle|abnormal|band-?like)(?: \w+){0,2}? densit(?:y|ies)",
            r"densit(?:y|ies) (?:\w+ ){0,5}?(?:lungs?|lobe|bases?|lingula|mid-?lung|apex)\b",
        ),
    ),
    ((CM,), (r"cardiomegaly", r"enlarge\w+ of the (?:heart|cardiac)\b", r"(?:bi)?ventricular enlargement")),
    ((EC,), (r"(?:widen\w+|enlarge\w+|prominen\w+) of the (?:superior |upper )?(?:cardio-?)?mediastin\w+", r"mediastinal (?:mass|hematoma|fullness)\b")),
    ((FRACTURE,), (r"fractur\w*", r"fx\b")),
    (
        (SUPPORT_DEVICES,),
        (
            r"(?:pace-?makers?|pacers?|pacing|a?icds?|defibrillators?|stimulators?|devices?|generators?)\b",
            r"leads?\b(?! to)",
            r"(?:catheters?|cannulas?|piccs?|tubes?|tracheostomy|ett|ngt|swan[- ]ganz|drains?)\b",
            r"(?:central|picc|venous|arterial|subclavian|jugular|dialysis|femoral|ij|midline|support)(?: venous| access)? lines?\b",
            r"lines and tubes",
            r"(?:port-?a-?cath|portacath|med-?i-?port)s?",
            r"(?:chest|chest wall|infusion|subclavian|jugular|power|access|xxxx)[- ]ports?\b",
            r"(?:sternotomy|wires?|sutures?|clips?|staples?|stents?|endografts?|hardware|screws?|rods?|instrumentation)\b",
            r"plates?\b(?![- ]?like)",
            r"(?:prosthe|arthroplast|annuloplast|valvuloplast)\w*",
            r"(?:mechanical|artificial|porcine|replaced)(?: \w+){0,2}? valves?",
            r"val(?:ve|vular) (?:replacements?|repairs?)",
            r"(?:shoulder|joint|hip) replacements?",
            r"(?:internal|anterior|posterior|plate|rod|screw) fixation",
            r"(?:spinal|anterior|posterior|cervical|lumbar|interbody) fusion",
            r"(?:ivc|caval?) filter",
            r"(?:embolization )?coils\b",
            r"lap[- ]?band|gastric band|(?:infusion|balloon) pump",
            r"(?:loop|event) recorders?",
            r"(?:tip|terminat\w+)\b(?: \w+){0,7}? (?:svc|superior vena cava|cavo-?atrial|right atri(?:um|al)|atriocaval|carina)\b",
        ),
    ),
)


def _any(terms: Iterable[str]) -> str:
    return "|".join(f"(?:{term})" for term in terms)


MENTION = re.compile(r"(?<![a-z])(?:" + "|".join(f"(?P<m{i}>{_any(terms)})" for i, (_, terms) in enumerate(_MENTIONS)) + ")")
LABELS_OF = {f"m{i}": labels for i, (labels, _) in enumerate(_MENTIONS)}

# ---------------------------------------------------------------------------------------------- organs and their state
# An organ whose state is told by an adjective ("the heart is enlarged", "normal mediastinum"). Normality of an organ is
# the absence of ABSENT_IF_NORMAL; PRESENT_IF_ABNORMAL says which adjectives turn which organ into a finding.
_ORGANS = {
    "other": r"aort\w+|hil(?:um|a|ar)\b|trachea\w*|(?:hemi)?diaphragms?|abdomen|spine|soft tissues|lung volumes?|volumes|"
    r"(?:right|left) (?:\w+ )?(?:lung|heart)\b|(?:pulmonary|central) arter\w+|lymph nodes?|azygos|atri(?:um|al)|ventric\w+|airways?|"
    r"mediastinal (?:clips?|wires?|drains?|lymph\w*|nodes?|adenopathy|mass\w*|surgical)|thyroid|stomach|"
    r"cardiac (?:pac\w+|device|leads?|defib\w+|monitor\w*|stents?|valve|surgery|cath\w*|margin|apex|generator|silhouette and mediastinal fat)",
    "cardiomediastinum": r"cardio-? ?mediastin\w+",
    "heart": r"heart\b(?! failure)|cardiac\b(?! (?:failure|decomp\w*|congest\w*|and pulmonary disease|disease))",
    "mediastinum": r"mediastin(?:um|al)",
    "vessels": r"(?:pulmonary |lung )?vascul(?:ar|arity|ature|aturity)\b|pulmonary vessels|vessels",
    "lungs": r"lungs\b|lung (?:fields?|parenchyma|zones?|xxxx)\b|pulmonary parenchyma",
    "pleura": r"pleural (?:spaces?|surfaces?|cavit\w+)\b|pleura\b",
    "sulci": r"costo-? ?(?:phrenic|diaphragmatic)\b|sulci\b",
    "bones": r"(?:osseous|bony|skeletal|bone)(?: (?:structures?|thorax|skeleton|elements))?\b|bones|skeleton|rib cage|ribs\b|thoracic cage",
}
ORGAN = re.compile("|".join(rf"(?P<{name}>\b(?:{terms}))" for name, terms in _ORGANS.items()))

_STATES = {
    # At the limit of normal the reader hedges: Cardiomegaly is uncertain.
    "limit": r"(?:upper|top|high)(?:[- ](?:limits?|range))?(?:[- ]of)?(?:[- ]the)?[- ]normal|(?:near )?top[- ]normal|borderline(?: enlarged| prominent| size)?",
    "enlarged": r"(?:enlarge(?:d|ment)|widen(?:ed|ing)|dilated|large|big|increased in size|prominen(?:t|ce)|full(?:ness)?|engorge(?:d|ment)|congested|indistinct(?:ness)?|accentuat(?:ed|ion)|increased)\b",
    "normal": r"(?:normal|unremarkable|within (?:the )?(?:normal )?(?:limits?|range)(?: of normal)?|normal limits|nonenlarged|non-enlarged)\b",
    "clear": r"(?:clear|sharp|preserved)\b(?! (?:of|from|that|interval|change|increase|evidence))",
    "intact": r"intact\b",
    # Another state that takes the organ before it, unless a second adjective goes on about the same organ.
    "neutral": r"(?:(?:hyper|hypo|under|over|well[- ]|normally )?-?(?:expanded|inflated|aerated|lucent)|stable|unchanged|tortuous|low|similar|obscured|limited|midline|degenerative|calcified)\b"
    r"(?!,? (?:and|but)?,? ?(?:(?:the|are|is|otherwise|grossly|appears?|remains?) )*(?:clear|normal|unremarkable|within))",
}
STATE = re.compile("|".join(rf"(?P<{name}>\b(?:{terms}))" for name, terms in _STATES.items()))

ABSENT_IF_NORMAL: dict[str, tuple[str, ...]] = {
    "other": (),
    "cardiomediastinum": (EC, CM),  # the whole is normal, so its part is
    "heart": (CM,),
    "mediastinum": (EC,),
    "vessels": (EDEMA,),  # congestion of the vessels counts as edema, so their normality denies it
    "lungs": (OPACITY, CONSOLIDATION),
    "pleura": (EFFUSION, PNEUMOTHORAX),
    "sulci": (EFFUSION,),
    "bones": (FRACTURE,),
}
PRESENT_IF_ABNORMAL: dict[str, tuple[str, ...]] = {"cardiomediastinum": (EC,), "heart": (CM,), "mediastinum": (EC,), "vessels": (EDEMA,)}
# Which organs an adjective can speak of at all: lungs are clear, bones are intact, nothing else is.
ORGANS_OF_STATE: dict[str, frozenset[str]] = {
    "clear": frozenset({"lungs", "pleura", "sulci", "cardiomediastinum", "other"}),
    "intact": frozenset({"bones", "other"}),
}

# --------------------------------------------------------------------------------------------------- global normality
_GLOBAL_SITE = r"cardio-? ?pulmonary|cardiac|pulmonary|cardio-? ?thoracic|intra-?thoracic|thoracic|chest|lungs?|pleural|cardiovascular|radio(?:graph|log)ic(?:al)?|preoperative|traumatic|active|acute"
_BONE_SITE = r"bon[ey]|osseous|skeletal|ribs?"
NO_ABNORMALITY = re.compile(
    r"\b(?:no|without|negative for|free of|clear of)\b"
    r"(?: (?:evidence|signs?|of|for|any|an?|convincing|definite|typical|radiographic|radiological|plain|film|obvious|"
    r"significant|other|additional|new|visible|identifiable|demonstrable|appreciable|demonstration|suspicious|focal|xxxx|specific))*"
    rf"(?P<acute>(?:,? ?(?:and|or|/)? ?(?:acute|active|subacute|chronic|significant|focal|gross))*)"
    rf"(?P<site>(?:,? ?(?:and|or|/)? ?(?:{_GLOBAL_SITE}|{_BONE_SITE}|soft tissue))*)"
    r" (?:abnormalit(?:y|ies)|disease|disorders?|process(?:es)?|findings?|patholog(?:y|ies)|changes|problems?)\b"
    r"(?! (?:of|to suggest|suggest\w*|suspicious|concerning|for|consistent|that)\b)"
)
GLOBAL_SITE = re.compile(rf"\b(?:{_GLOBAL_SITE})\b")
BONE_SITE = re.compile(rf"\b(?:{_BONE_SITE})\b")
NORMAL_STUDY = re.compile(
    r"(?<!otherwise )\b(?:normal|negative|unremarkable|clear)(?: (?:frontal|lateral|pa|ap|portable|two|2|view|views|and|appear\w+|examination|exam|study|of|the|x-?ray|radiographs?|single|adult))* "
    r"chest\b(?! (?:wall|tube|port|xxxx tip))"
    r"|\b(?:chest|study|exam(?:ination)?|radiographs?|films?)(?: (?:x-?(?:ray|xxxx)|radiographs?|film|exam\w*|is|are|appears?|within|the|grossly))* (?:normal|negative|unremarkable)\b(?! (?:for|size|heart|card|lung|pulm))"
    r"|(?<!otherwise )\b(?:normal|negative|unremarkable) (?:\w+ )?(?:study|exam(?:ination)?|radiographs?|x-?rays?|films?)\b"
    r"|^(?:normal|negative|unremarkable)[ .]*$"
)

# ---------------------------------------------------------------------------------------------------------------- cues
# In the order in which they are tried. A pseudo cue is one only by its words and swallows them.
_FILLER = r"(?:significant |interval |appreciable |definite |acute |obvious |substantial |other |marked |xxxx |radiographic |further )*"
_SEEN = r"(?:seen|identified|visuali[sz]ed|evident|present|apparent|appreciated|demonstrated|noted|observed|detected|found|visible|shown|suspected|evidenced)"
_NOT_EXCLUDED = r"(?:(?:can ?not|could not|can't|not|difficult to|unable to|nor)(?: (?:be|entirely|completely|fully|confidently|definitely|reliably|totally|absolutely|well))* (?:exclude[ds]?|excluding|ruled? ?-?out))"
_CUES = {
    "pseudo": rf"(?:no|without|not?(?: have)?) (?:evidence of |any )?{_FILLER}(?:change[sd]?|worsening|increase|enlargement of the (?=effusion)|progression|improvement|difference)\b(?: (?:in|of|from|to))?|not (?:{_FILLER}|significantly )(?:chang\w+|increas\w+|decreas\w+|worse\w*|improv\w+)|not only\b|no (?:other|additional|further)\b|gram negative",
    "unsure_post": rf"(?:is|are|remains?|being|be) (?:also )?(?:possible|suspected|questioned|considered|likely|probable|equivocal|unlikely|less likely)\b|(?:should|could|can) be considered|{_NOT_EXCLUDED}(?=(?: (?:on|at|by|in|given|with|clinically|radiographically|without|entirely|completely)\b|[.,; ]*$))|(?:(?:can ?not|could not) be (?:\w+ )?(?:excluded|ruled out))|(?:is|are) (?:not excluded|a possibility|a consideration|in the differential)|less likely\b(?=[ .,]*$)|unlikely\b(?=[ .,]*$)",
    "no_post": rf"(?:is|are|was|were|has|have)(?: been)? (?:now |not |no )*(?:completely |totally |essentially |since |xxxx )?(?:resolved|cleared|removed|absent|ruled out|excluded|gone)\b|(?:is|are|was|were) (?:not|no longer) (?:definitely |clearly |well )?(?:{_SEEN})\b|(?:not|no longer) (?:definitely |clearly )?{_SEEN}\b|: (?:none|no|absent|negative)\b|(?:appears?|is|are) (?:to be )?(?:within (?:normal )?limits|resolved)\b|resolved[ .]*$",
    "unsure": rf"{_NOT_EXCLUDED}|(?:may|might|could|can) (?:\w+ )?(?:represent|reflect|indicate|suggest|be|relate|have|also|simulate)\w*(?: (?:to|due|related|secondary|a|in part))*|may\b|possib(?:le|ly|ility)|probabl[ey]|potential(?:ly)?|likely|presum\w+|perhaps|suspected|suspicio(?:n|us)(?= (?:for|of))(?: for| of)|suspect\b|question(?:able|ed)?\b|equivocal|suggest(?:s|ing|ive|ion|ed)?\b|concern\w*(?= (?:for|of|about))|worr(?:y|isome)(?= (?:for|about))|differential|favor\w*|borderline|\? ?|xxxx (?:to )?(?:represents?|representing|reflects?|reflecting|secondary|due|related|consistent)|(?:most|more|less) xxxx|versus|vs\b\.?|indeterminate|unclear",
    "skip": r"(?:history|hx|h/o|known history) (?:of|for)?|status post|s/p|(?:to |xxxx )?(?:rule|r)[ -/]?(?:out|o)\b|to (?:\w+ )?(?:exclude|evaluate|assess)(?: for)?|(?:evaluate|evaluation|assess|assessment|assessed|evaluated|looking|look|screening|workup|search) for|exclude\b|(?:ensure|document|confirm|show|demonstrate|assess|until|to) (?:complete )?(?:resolution|clearing)(?: of)?|if (?:there is )?(?:clinical|concern)",
    "no": rf"(?:interval |complete )*(?<!near )(?<!near-)(?<!partial )(?<!near complete )(?<!near-complete )(?:resolution|clearing|removal) of|(?:previous(?:ly)?|prior) (?:seen |noted )?resolved|(?<!not )resolved|no longer\b|no\b|not\b|without\b|none\b|negative for|free of|free from|clear of|clear from|absen(?:t|ce)(?: of)?|lack of|denies|never|nor|neither|ruled out|with no|non\b",
    "end": r";|:|\. | - |–|—|\bbut\b|however|although|(?<!al)though\b|except(?:ing)?\b|apart from|aside from|other than|otherwise|while\b|whereas|yet\b|despite|(?<!consistent )(?<!compatible )(?<!associated )(?<!keeping )with\b|which\b|still\b|there (?:is|are)\b|again\b",
}
CUE = re.compile("|".join(rf"(?P<{name}>(?<![a-z])(?:{terms}))" for name, terms in _CUES.items()))

# A verb after the last comma or "and" starts a clause of its own: the cue before it no longer holds.
VERB = re.compile(r"\b(?:is|are|was|were|has|have|had|appears?|remains?|shows?|demonstrates?)\b")
# So does an adjective that only a finding which is there can have.
FRESH_START = re.compile(
    r"^[ ]*(?:there|the|an?|stable|unchanged|mild\w*|moderate\w*|severe\w*|marked\w*|minimal\w*|slight\w*|small|tiny|trace|persistent|"
    r"continued|interval|increas\w+|decreas\w+|improv\w+|worsen\w+|new|chronic|old|prior|healed|calcified|status|low|prominent|tortuous|"
    r"atherosclerotic|degenerative|emphysem\w+|left|right|bilateral|bi-?basilar|enlarged|borderline|normal|possible|probable|likely)\b"
)
CONNECTOR = re.compile(r"(?:,|\band\b|\bor\b|\bnor\b|/)")
# Between two mentions that are one choice ("atelectasis or infiltrate", "scarring/atelectasis").
CHOICE = re.compile(r"^[ ,]*(?:\w+ ){0,3}?(?:(?:and/)?or|versus|vs\.?|/)(?: ?[\w-]+){0,4}? ?$|^ ?/ ?$")
LISTED = re.compile(r"^[ ,]*(?:(?:and/or|and|or|nor|/)[ ,]*)?(?:[\w-]+ ){0,4}?$")

# ---------------------------------------------------------------------------------------------------------------- MeSH
_NOT_LUNG = r"/(?:abdomen|breast|neck|shoulder|spine|ribs?|thoracic vertebrae|soft tissue|humerus|aorta)"
MESH: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(pattern), labels)
    for pattern, labels in (
        (r"cardiomegaly|cardiac shadow/.*(?:enlarged|borderline)|heart/.*enlarged", (CM,)),
        (r"mediastinum/(?!.*(?:lymph nodes|blood vessels)).*(?:prominent|enlarged)", (EC,)),
        (r"pleural effusion|costophrenic angle/.*blunted|sulcus/.*blunted|hydropneumothorax|hemopneumothorax|hemothorax", (EFFUSION,)),
        (r"pneumothorax|hydropneumothorax|hemopneumothorax", (PNEUMOTHORAX,)),
        (r"pulmonary atelectasis|atelectasis|volume loss", (ATELECTASIS,)),
        (r"consolidation", (CONSOLIDATION,)),
        (r"pneumonia", (PNEUMONIA,)),
        (r"pulmonary edema|pulmonary congestion|heart failure", (EDEMA,)),
        (rf"(?:nodule|mass|granuloma|calcified granuloma|neoplasms?|cavitation|(?:density|opacity)(?=/.*round))(?!{_NOT_LUNG})", (LESION,)),
        (rf"(?:opacity|infiltrate|airspace disease|lung diseases, interstitial)(?!{_NOT_LUNG})", (OPACITY,)),
        (r"density/(?:lung|retrocardiac|right|left|costophrenic)(?!.*round)", (OPACITY,)),
        (r"markings/.*interstitial|cicatrix/(?!.*pleura)", (OPACITY,)),
        (r"(?:thickening|cicatrix|calcinosis)/.*pleura|pleura/", (PLEURAL,)),
        (r"fractures, bone", (FRACTURE,)),
        (r"catheters, indwelling|implanted medical device|medical device|surgical instruments|tube, inserted|stents|sutures|spinal fusion", (SUPPORT_DEVICES,)),
    )
)
MESH_SILENT = ("no indexing", "technical quality of image unsatisfactory")
MESH_NORMAL = "normal"

__all__ = ["NO_FINDING"]
