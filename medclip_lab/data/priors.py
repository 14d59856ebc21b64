"""References to earlier studies, taken out of a sentence or together with it.

One image shows no change: "the effusion has increased since the prior study" asks of it what it does not hold, and what
is trained on such words speaks of studies that do not exist (Ramesh et al., ML4H 2022, arXiv 2210.06340, who let
language models take the words out; here rules do).

What the rules do:

* A sentence goes whole if what stays would no longer be true or would only ask: nothing new, no change, nothing left
  ("no new opacity", "no interval change in the effusion", "no residual pneumothorax"), what was there and is not ("has
  resolved", "no longer seen", "removal of"), "no prior study", "recommend comparison with".
* A comparison goes: "compared to the prior study of ...", "since the last radiograph", "not seen on the prior film",
  "in the interval", "without significant change".
* A predicate of change goes and leaves its subject: "the effusion is unchanged", "has increased in size".
* Words of change before a noun go: "stable", "new", "worsening", "interval increase in"; "again seen" becomes "seen".
* What then says nothing goes too ("stable examination").

What an image can show stays: "increased interstitial markings", "the heart is enlarged", "larger than the right one",
"old fracture", "prior sternotomy", "degenerative changes".
"""

import re
from functools import lru_cache

from medclip_lab.data.report import MARK

# ------------------------------------------------------------------------------------------------ what is compared with
_EARLIER = r"(?:prior|previous|preceding|earlier|last|latest|most recent|recent|remote|old|older|outside|comparison)"
_STUDY = (
    r"(?:stud(?:y|ies)|exam(?:ination)?s?|(?:radio(?:graph|gram)|film|image|x-? ?ray|ct|scan)s?|comparisons?|reports?|"
    r"imaging)\b"
)
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DATE = rf"(?:{MARK}|\d[\d/.:-]*|yesterday|{_MONTH})"
_DATED = rf"(?:,? (?:of|from|dated|performed|obtained|done|on|at)(?: on)?(?:,? {_DATE})+)"
_ARTICLE = r"(?:(?:that|those) (?:of|on|from|in) )?(?:(?:the|a|an|his|her|any|multiple) )?(?:patient's )?"
_OTHER_WORDS = r"(?: (?!and\b|the\b|is\b|are\b|with\b)[a-z-]+){0,2}"
# "the prior portable study of 3 May", "that of previous radiographs", "prior".
_PRIOR = (
    rf"(?:{_ARTICLE}{_EARLIER}(?:,? {_EARLIER})*(?:{_OTHER_WORDS} {_STUDY}{_DATED}?|s?\b(?! [a-z]))|"
    rf"{_ARTICLE}{_STUDY}{_DATED}|before\b)"
)
# After "since" and "compared with" a date alone will do.
_ANY_PRIOR = rf"(?:{_PRIOR}|{_DATE}(?:,? {_DATE})*(?! ?[a-z])|(?:the )?{_STUDY})"

# --------------------------------------------------------------------------------------------------- how it is compared
_HOW = (
    r"(?:(?:again|now|still|also|since|slightly|mildly|moderately|markedly|significantly|substantially|considerably|"
    r"somewhat|grossly|essentially|relatively|overall|otherwise|minimally|further|interval|much|slight|generally|not|"
    r"been|become|more) )*"
)
_GREAT = (
    r"(?:significant |substantial |appreciable |definite |relevant |major |obvious |marked |gross |interval |real |"
    r"acute )*"
)
_BE = r"(?:is|are|was|were|appears?|remains?|remained)"
_SAME = r"(?:unchanged|stable)(?:[- ]appearing)?"
_SEEN = r"(?:seen|noted|described|identified|demonstrated|reported|visualized|mentioned|shown)"
_CHANGING = (
    r"(?:grossly |essentially |relatively |overall |slightly |mildly )?"
    rf"(?:{_SAME}|persistent|persisting|continued|improving|improved|worsening|worsened|increasing|decreasing|resolving|"
    rf"enlarging|evolving|new|newly|interval|previously {_SEEN})"
)
_MEASURE = r"(?:size|appearance|extent|position|number|severity|contour|configuration)"
_OF_WHAT = rf"(?: in (?:overall )?{_MEASURE}(?: (?:and|or) {_MEASURE})?)?"
_CLAUSE = rf"(?:[\w-]+ ){{1,5}}?(?:{_BE}|has|have|there|shows?|persists?)\b"
# A predicate of change ends its clause, or a new clause or an adverbial follows.
_PREDICATE_END = (
    r"(?= *(?:[,;.)]|$)| (?:and|but|while|although|in|on|at|with|as|since|from|than|compared|without|given)\b)"
    r"(?:,? (?:and|but|while|although)(?= ))?"
)

_WITHOUT_CHANGE = re.compile(
    rf",? (?:without|with no)(?: evidence of)? {_GREAT}(?:changes?|progression|worsening|difference)\b(?! of)"
    rf"(?: (?:since|from|compared (?:to|with)) {_ANY_PRIOR})?",
    re.IGNORECASE,
)
_UNTRUE_WITHOUT = re.compile(
    rf"\b(?:no|without|not any|nor)\b(?: evidence of| sign of)? {_GREAT}"
    r"(?:new(?:ly)?|changes?(?! of)|progression|worsening|improvement|increase|decrease|difference|interval|recurrent|"
    r"recurrence|residual|persistent|increasing|enlarging|remaining)\b"
    r"|\bno longer\b|\bresolved\b|\b(?:resolution|clearing|removal|disappearance) of\b|\bextubat\w+"
    r"|\b(?:has|have|had|is|are|was|were)(?: \w+){0,3}? (?:cleared|removed|gone|disappeared|withdrawn)\b"
    rf"|\bno {_EARLIER} (?:[a-z]+ ){{0,2}}?{_STUDY}"
    r"|\brecommend\w* (?:\w+ ){0,3}?(?:comparison|correlation) (?:to|with)\b",
    re.IGNORECASE,
)
_REMOVED = tuple(
    (re.compile(pattern, re.IGNORECASE), instead)
    for pattern, instead in (
        # Comparisons.
        (
            r",? ?\(?\b(?:(?:in|by) comparison|comparison (?:is|was) made|(?:as |when )?compar(?:ed|ing)(?: back)?|"
            rf"relative) (?:to|with) {_ANY_PRIOR}\)?,?",
            " ",
        ),
        (rf",? ?\(?\b(?:ever )?since(?: (?:on|in|at))? {_ANY_PRIOR}\)?,?", " "),
        (rf",? ?\(?\b(?:from|than)(?: (?:on|in|at|to))? {_PRIOR}\)?,?", " "),
        (r",? ?\b(?:in|on|over|during) (?:the )?(?:interval|interim)\b,?", " "),
        (
            r",? ?\b(?:which (?:is|was|were) )?(?:as )?(?:not )?(?:more |better |best |well[- ])?(?:readily |clearly )?"
            rf"{_SEEN} (?:on|in) {_PRIOR}",
            " ",
        ),
        # Predicates of change.
        (rf"\b(?P<be>{_BE}) {_HOW}{_SAME} (?:and|but) (?!{_CLAUSE})", r"\g<be> "),
        (
            rf",?(?: which| that)? (?<!there )\b(?:{_BE}|(?:has|have) remained)(?: to be)? {_HOW}"
            rf"(?:{_SAME}|similar(?: to {_PRIOR})?|improved|changed|persistent|the same|"
            rf"(?:larger|smaller|worse|better)(?! than)){_OF_WHAT}{_PREDICATE_END}",
            ";",
        ),
        (
            rf",?(?: which| that)? \b(?:has|have) {_HOW}(?:increased|decreased|improved|worsened|progressed|changed|"
            rf"enlarged|grown|diminished|persisted|evolved){_OF_WHAT}{_PREDICATE_END}",
            ";",
        ),
        (rf"(?:,|,? and|,? but)? {_HOW}{_SAME}{_OF_WHAT}(?= *(?:[,;.]|$))", ""),
        (rf", {_HOW}similar{_OF_WHAT}(?: to {_PRIOR})?(?= *(?:[,;.]|$))", ""),
        (rf"(?:,|,? and|,? or) {_GREAT}(?:interval|significant) changes?\b", ""),
        (rf", previously {_SEEN},", ""),
        # Words before a noun.
        (
            r"\b(?:slight |mild |moderate |significant |marked |further |continued |partial )*"
            r"(?:interval (?:\w+ )?(?:increase|decrease|reduction|enlargement|development|change|improvement|worsening|"
            r"progression)|(?:improvement|worsening|progression))(?: in| of)(?: the)?"
            r"(?: (?:size|extent|severity|amount|volume|degree) of(?: the)?)?\b",
            "",
        ),
        (r"\bre-?demonstrat(?:ed|ion)\b(?: is| are| of)?|\b(?:once )?again\b,?", ""),
        (rf"\bstill(?= (?:{_SEEN}|present|visible|evident))", ""),
        # "No pneumothorax, stable cardiomegaly": the word for change ended the reach of the "no".
        (rf"(?P<denial>\b(?:no|not|without|negative|free|clear)\b[^;]*?)(?:,|,? and) {_CHANGING}\b", r"\g<denial>;"),
        (rf"\b{_CHANGING}\b", ""),
    )
)
_TIDY = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"\s+", " "),
        (r"\b([Aa]) (?=[aeio])", r"\1n "),
        (r"\b([Aa])n (?=[^aeiouh])", r"\1 "),
        (r" (?=[,;.])", ""),
        (r"[,;]+(?=[,;.])", ""),
        (r"^[ ,;.:-]+|[ ,;]+$", ""),
        (r"^(?:and|but|or|while|which) ", ""),
    )
)
_SAYS_NOTHING = re.compile(
    r"(?:\b(?:the|an?|is|are|was|were|has|have|been|be|there|this|that|these|it|in|of|on|to|with|and|or|as|at|by|for|no|"
    r"not|also|overall|otherwise|little|minimal|slight|significant|grossly|essentially|seen|noted|made|available|change|"
    r"stud(?:y|ies)|exam(?:ination)?|radiographs?|image|chest|findings?|appearances?|comparison|prior|previous|size|"
    r"interval)\b|[^a-zA-Z])*",
    re.IGNORECASE,
)


@lru_cache(maxsize=2**14)  # reports repeat their sentences
def without_priors(sentence: str) -> str:
    """The sentence without what it says of earlier studies; empty if nothing true and telling is left.

    What remains states of this image what the sentence stated.
    """
    left = _WITHOUT_CHANGE.sub("", sentence)
    if _UNTRUE_WITHOUT.search(left):
        return ""
    for pattern, instead in _REMOVED:
        left = pattern.sub(instead, left)
    if left == sentence:
        return sentence
    for pattern, instead in _TIDY:
        left = pattern.sub(instead, left)
    if _SAYS_NOTHING.fullmatch(left):
        return ""
    if sentence.endswith(".") and not left.endswith("."):
        left += "."
    return left[0].upper() + left[1:] if sentence[0].isupper() else left
