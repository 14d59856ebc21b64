"""References to earlier studies. Every sentence here is made up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclip_lab.data.labeller import label_sentence
from medclip_lab.data.priors import without_priors

from .test_labeller import table

REMOVED = "_" * 3  # a mark of de-identification


@pytest.mark.parametrize(
    "sentence, left",
    [
        # Comparisons.
        ("Compared to the prior study, there is a small effusion.", "There is a small effusion."),
        (f"As compared to {REMOVED}, there is a small effusion.", "There is a small effusion."),
        (f"In comparison with the study of {REMOVED}, the heart is enlarged.", "The heart is enlarged."),
        ("Since the last portable radiograph of 3 May, a chest tube was placed.", "A chest tube was placed."),
        ("Small left effusion (compared to prior).", "Small left effusion."),
        ("In the interval, a chest tube was placed.", "A chest tube was placed."),
        ("Small nodule, not seen on the previous film.", "Small nodule."),
        ("Small effusion without significant change from the prior exam.", "Small effusion."),
        # Predicates of change.
        ("Small left effusion, unchanged since the previous study.", "Small left effusion."),
        ("Moderate cardiomegaly, unchanged, with mild edema.", "Moderate cardiomegaly, with mild edema."),
        ("The small left effusion is unchanged.", "The small left effusion."),
        ("The effusion has increased in size and the heart is enlarged.", "The effusion; the heart is enlarged."),
        ("Heart size is stable and the lungs are clear.", "Heart size; the lungs are clear."),
        ("The heart is stable and normal in size.", "The heart is normal in size."),
        ("The heart is enlarged but stable.", "The heart is enlarged."),
        ("The nodule is similar to the prior scan.", "The nodule."),
        # Words before a noun.
        ("Stable cardiomegaly.", "Cardiomegaly."),
        ("There is a new opacity at the left base.", "There is an opacity at the left base."),
        ("There is persistent blunting of the left sulcus.", "There is blunting of the left sulcus."),
        ("Interval improvement in the right effusion.", "Right effusion."),
        ("Slight interval increase in the size of the right effusion.", "Right effusion."),
        ("The effusion is again seen.", "The effusion is seen."),
        ("Resolving left pneumonia.", "Left pneumonia."),
        ("The previously described opacity, again noted, is atelectasis.", "The opacity, noted, is atelectasis."),
        # Nothing true or telling is left.
        ("No significant interval change.", ""),
        ("No change in the left effusion.", ""),
        ("No new opacity.", ""),
        ("No residual pneumothorax.", ""),
        ("Pneumothorax is no longer seen.", ""),
        ("The right effusion has resolved.", ""),
        ("Interval removal of the chest tube.", ""),
        ("The chest tube has been removed.", ""),
        ("Unchanged.", ""),
        ("Stable examination.", ""),
        (f"Comparison is made to the prior radiograph dated {REMOVED}.", ""),
        ("There are no prior studies for comparison.", ""),
        ("Recommend comparison with older films.", ""),
        ("", ""),
    ],
)
def test_references_to_earlier_studies_go(sentence: str, left: str) -> None:
    assert without_priors(sentence) == left


@pytest.mark.parametrize(
    "sentence",
    [
        "Small left effusion.",
        "Increased interstitial markings.",
        "Interstitial markings are increased.",
        "Lung volumes are decreased.",
        "The heart is enlarged.",
        "Enlargement of the cardiac silhouette.",
        "The left effusion is larger than the right.",
        "The left hilum is similar to the right.",
        "Old healed rib fracture.",
        "Prior sternotomy with intact wires.",
        "Changes from a prior infection.",
        "No acute osseous changes.",
        "Degenerative changes of the spine.",
        "The remaining lung is clear.",
        "No pneumothorax.",
        "The heart remains enlarged.",
        "The tube ends in the stomach.",
    ],
)
def test_what_an_image_shows_stays(sentence: str) -> None:
    assert without_priors(sentence) == sentence


@pytest.mark.parametrize("sentence, labels", table())
def test_what_is_left_states_what_the_sentence_stated(sentence: str, labels: dict[str, int]) -> None:
    assert not without_priors(sentence) or label_sentence(without_priors(sentence)) == labels


@pytest.mark.parametrize("finding, name", [("effusion", "Pleural Effusion"), ("pneumonia", "Pneumonia")])
@pytest.mark.parametrize(
    "sentence",
    [
        "Stable {}.",
        "New {}.",
        "The {} is unchanged.",
        "Worsening {} since the prior study.",
        "{}, unchanged.",
        "{} again.",
    ],
)
def test_a_finding_outlives_its_history(sentence: str, finding: str, name: str) -> None:
    left = without_priors(sentence.format(finding))
    assert label_sentence(left) == {name: 1}
    assert without_priors(left) == left


@given(st.text(max_size=100))
def test_any_text(text: str) -> None:
    without_priors(text)


@pytest.mark.parametrize("sentence", ["stable " * 3000, "compared to the " * 1500, "is now " * 3000, "prior " * 3000])
def test_long_lines_are_read_in_linear_time(sentence: str) -> None:
    without_priors(sentence)  # a quadratic rule would take minutes here
