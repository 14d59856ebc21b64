"""Cues of the labeller: words that negate, doubt or set aside the findings around them, and where their scope ends.

Regular expressions over a lower-case sentence with single blanks; the logic stands in `labeller`. Cues with a scope are
NegEx's idea (Chapman et al., J Biomed Inform 2001); the words are ours.
"""

import re

from medclip_lab.data.label_rules import named

_DEGREE = (
    r"(?:significant(?:ly)? |interval |appreciabl[ey] |definitel?y? |acute(?:ly)? |obvious(?:ly)? |substantial(?:ly)? |"
    r"marked(?:ly)? |xxxx |radiographic(?:ally)? |clearly |well[ -])*"
)
_SEEN = (
    r"(?:seen|identified|visuali[sz]ed|evident|present|apparent|appreciated|demonstrated|noted|observed|detected|found|"
    r"visible|shown|suspected)"
)
_ON_ANOTHER = (
    r" (?:on|in) (?:the |a |any |multiple )?(?:prior|previous|preceding|earlier|recent|most recent|last|old|remote|"
    r"outside|comparison)\b"
)
# Before "resolved" these leave something: "nearly resolved" is still there.
_PARTLY = (
    "not", "not yet", "not completely", "not fully", "partial", "partially", "partly", "incomplete", "incompletely",
    "mostly", "largely", "near", "nearly", "nearly completely", "near complete", "near-complete", "almost",
    "almost completely",
)  # fmt: skip
_WHOLLY = "(?<!near-)" + "".join(f"(?<!{adverb} )" for adverb in _PARTLY)
_NOT_EXCLUDED = (
    r"(?:can ?not|could not|can't|not|difficult to|unable to)"
    r"(?: (?:be|entirely|completely|fully|confidently|definitely|reliably|totally|absolutely))* "
    r"(?:exclude[ds]?|ruled? ?-?out)"
)
# Tried in this order. "..._post" speak of the mentions before them, the others of those that follow.
CUE = named(
    {
        # Words that look like a negation and are none.
        "pseudo": rf"(?:no|without|not)(?: evidence of| any)? {_DEGREE}(?:chang\w+|worse\w*|increas\w+|decreas\w+|"
        r"improv\w+|progress\w+|resol\w+|clear(?:ing|ed)|difference|"
        r"enlargement of (?:the )?(?!heart|cardi|medias))\b|not (?:only|without)\b|gram negative",
        "skip_post": r"(?:may|might|could|can) not (?:be )?(?:well )?"
        r"(?:demonstrated|visuali[sz]ed|detected|seen|visible|evident)",
        "unsure_post": r"(?:is|are|remains?|be) (?:also )?"
        r"(?:possible|suspected|questioned|considered|likely|probable|equivocal|unlikely|less likely)\b"
        r"|(?:should|could|can) be considered"
        r"|(?:is|are) (?:in the differential|(?:a|an|another|also a) (?:\w+ )?(?:possibility|consideration|concern)\b)"
        rf"|{_NOT_EXCLUDED}(?=[.,; ]*$| (?:on|at|by|in|given|with\w*|clinically|entirely|completely)\b)"
        r"|(?:less likely|unlikely)\b(?=[ .,]*$)",
        "no_post": r"(?:is|are|was|were|has|have)(?: been)? (?:now )?(?:completely |totally |essentially |since )?"
        r"(?:resolved|cleared|removed|absent|ruled out|excluded|gone)\b"
        rf"|(?:not|no longer) {_DEGREE}{_SEEN}\b(?! (?:is|are)\b|{_ON_ANOTHER})|: (?:none|no|absent|negative)\b"
        rf"|{_WHOLLY}resolved(?=[ .]*$)",
        "unsure_list": r"differential",
        "unsure": rf"{_NOT_EXCLUDED}|may\b|might\b|could\b|can be\b|possib(?:le|ly|ility)|probabl[ey]|potential(?:ly)?|"
        r"likely|presum\w+|perhaps|suspected|suspect\b|suspicio(?:n|us) (?:for|of)|question(?:able|ed)?\b|equivocal|"
        r"(?:thought|felt|believed) to|doubt(?:ful)?\b|rather than|not (?:diagnostic|specific) (?:of|for)|"
        r"in the (?:right|correct|appropriate|proper) (?:clinical )?(?:setting|context)|"
        r"suggest\w*|concern\w* (?:for|of|about)|worr(?:y|isome) (?:for|about)|favor\w*|borderline|\? ?|"
        r"xxxx (?:to )?(?:represent|reflect|secondary|due|related)\w*|(?:most|more|less) xxxx|indeterminate|unclear",
        "versus": r"versus\b|vs\b\.?",
        # What is asked, planned or past tells nothing of this image.
        "skip": r"(?:history|hx) of|h/o|"
        r"(?:prior|previous|past|recent|treated|(?:treatment|therapy) (?:for|of))"
        r"(?= (?:\w+ ){0,2}?(?:pneumonia|infection|edema|chf|heart failure)\b)|"
        r"correlat\w+(?: clinically)? (?:for|with|as to)|sensitive (?:for|in|to)|in (?:case|the event) of|"
        r"^should (?!be )|"
        r"(?:rule|r)[ /-]?(?:out|o)\b|(?:may|could) obscure|"
        r"to (?:\w+ )?(?:exclude|evaluate|assess|identify)(?: for)?|"
        r"(?:(?<!limited )(?<!limits )evaluat\w+|assess\w*|look|looking|search|screening|workup)(?: for| of)|exclude\b|"
        r"(?:ensure|document|confirm|show|demonstrate|assess|until|to) (?:complete )?(?:resolution|clearing)(?: of)?|"
        r"if\b(?: there (?:is|are))?|no (?:other|additional|further)\b|please note",
        "no": rf"(?:interval |complete )*{_WHOLLY}(?:(?:resolution|clearing|removal) of|resolved)|"
        r"clear(?= (?:focal )?(?:air-? ?space|infiltrat|consolidat|opaci))|no\b|"  # "clear [of] airspace disease"
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
CHOICE = re.compile(
    r" ?/ ?|[ ,]*(?:(?!with|no|but)\w+ ){0,3}?(?:(?:and/)?or|versus|vs\.?|/)(?: ?[\w-]+(?: [\w-]+){0,3}?)? ?"
)
LISTED = re.compile(r" ?(?:,? ?(?P<joint>and/or|and|or|nor|/)|,) ?(?:(?!with|but)[\w-]+ ){0,4}?")
