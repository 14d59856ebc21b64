"""The rule labeller against a table of sentences of our own, MeSH terms, and, where they are, real reports."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT, SUPPORT_DEVICES, UNCERTAIN
from medclip_lab.data.labeller import (
    combine_labels,
    label_report,
    label_sentence,
    labelled_sentences,
)

# Sentence | the labels it mentions, all of them.
SENTENCES = """
Small left pleural effusion. | Pleural Effusion=1
No pleural effusion. | Pleural Effusion=0
There is no pleural effusion or pneumothorax. | Pleural Effusion=0, Pneumothorax=0
No focal consolidation, pleural effusion, or pneumothorax. | Consolidation=0, Pleural Effusion=0, Pneumothorax=0
Negative for pneumothorax or effusion. | Pneumothorax=0, Pleural Effusion=0
The lungs are free of focal airspace disease, edema and pneumonia. | Lung Opacity=0, Edema=0, Pneumonia=0
No pneumothorax, stable cardiomegaly. | Pneumothorax=0, Cardiomegaly=1
No pneumothorax and mild cardiomegaly. | Pneumothorax=0, Cardiomegaly=1
No pneumothorax, but there is a small effusion. | Pneumothorax=0, Pleural Effusion=1
No edema; moderate left effusion. | Edema=0, Pleural Effusion=1
No consolidation with a small left effusion. | Consolidation=0, Pleural Effusion=1
No acute infiltrate, however there is a calcified granuloma in the left apex. | Lung Opacity=0, Lung Lesion=1
Cardiomegaly without edema. | Cardiomegaly=1, Edema=0
Cardiomegaly, without evidence of congestive heart failure. | Cardiomegaly=1, Edema=0
The lungs are clear except for scarring at the left base. | Lung Opacity=1, Consolidation=0
No evidence of pneumothorax although a rib fracture is seen. | Pneumothorax=0, Fracture=1
Neither effusion nor pneumothorax is seen. | Pleural Effusion=0, Pneumothorax=0
Pneumothorax is not seen. | Pneumothorax=0
Effusion and pneumothorax are not identified. | Pleural Effusion=0, Pneumothorax=0
Left basilar opacity is seen, pneumothorax is not identified. | Lung Opacity=1, Pneumothorax=0
Pneumonia has been ruled out. | Pneumonia=0
Effusion: none. | Pleural Effusion=0
Absence of pleural effusion. | Pleural Effusion=0
No opacity to suggest pneumonia. | Lung Opacity=0, Pneumonia=0
No opacity consistent with pneumonia. | Lung Opacity=0, Pneumonia=0
No definite pneumothorax. | Pneumothorax=0
No large pleural effusion. | Pleural Effusion=0
Interval resolution of the right effusion. | Pleural Effusion=0
The left pneumothorax has resolved. | Pneumothorax=0
Previously seen infiltrate is no longer visualized. | Lung Opacity=0
Resolved edema. | Edema=0
Near-complete resolution of the effusion. | Pleural Effusion=1
The chest tube has been removed. | Support Devices=0
Interval removal of the endotracheal tube. | Support Devices=0
Resolving left lower lobe pneumonia. | Pneumonia=1
No change in the left effusion. | Pleural Effusion=1
No significant interval change in right apical pneumothorax. | Pneumothorax=1
Left lower lobe consolidation is not significantly changed. | Consolidation=1
The effusion is not increased. | Pleural Effusion=1
No increase in the effusion. | Pleural Effusion=1
Bibasilar atelectasis without significant change. | Atelectasis=1
No worsening of the edema. | Edema=1
Possible left lower lobe pneumonia. | Pneumonia=-1
Patchy opacity may represent atelectasis. | Lung Opacity=1, Atelectasis=-1
Right basilar opacity, likely atelectasis. | Lung Opacity=1, Atelectasis=-1
Right basilar opacity, atelectasis versus pneumonia. | Lung Opacity=1, Atelectasis=-1, Pneumonia=-1
Left basilar atelectasis or infiltrate. | Atelectasis=-1, Lung Opacity=-1
Scarring/atelectasis in the lingula. | Lung Opacity=-1, Atelectasis=-1
Small effusion cannot be excluded. | Pleural Effusion=-1
Cannot exclude a small pneumothorax. | Pneumothorax=-1
A tiny effusion is not excluded. | Pleural Effusion=-1
Findings suspicious for pneumonia. | Pneumonia=-1
Opacity concerning for a mass. | Lung Opacity=1, Lung Lesion=-1
Questionable nodule in the right upper lobe. | Lung Lesion=-1
Pneumonia is unlikely. | Pneumonia=-1
Small bilateral effusions suspected. | Pleural Effusion=-1
Early edema should be considered. | Edema=-1
Probable small pleural effusions. | Pleural Effusion=-1
Suggestion of mild interstitial edema. | Edema=-1
Consolidation compatible with pneumonia. | Consolidation=1, Pneumonia=1
No pneumothorax, possible small effusion. | Pneumothorax=0, Pleural Effusion=-1
Differential includes edema, infection and hemorrhage. | Edema=-1, Pneumonia=-1
Possible pneumonia with small effusion. | Pneumonia=-1, Pleural Effusion=1
History of pneumonia. |
Radiograph to rule out pneumothorax. |
CT is recommended to exclude an underlying mass. |
Follow-up to ensure resolution of the pneumonia. |
If there is concern for fracture, obtain a rib series. |
Please note that fractures may not be demonstrated. |
The heart is normal in size. | Cardiomegaly=0
Heart size within normal limits. | Cardiomegaly=0
Heart size is at the upper limits of normal. | Cardiomegaly=0
The heart is not enlarged. | Cardiomegaly=0
The heart is mildly enlarged. | Cardiomegaly=1
Moderate enlargement of the cardiac silhouette. | Cardiomegaly=1
No cardiac enlargement. | Cardiomegaly=0
Borderline heart size. | Cardiomegaly=-1
Heart size is normal to mildly enlarged. | Cardiomegaly=1
The mediastinal contours are normal. | Enlarged Cardiomediastinum=0
There is no mediastinal widening. | Enlarged Cardiomediastinum=0
The mediastinum is widened. | Enlarged Cardiomediastinum=1
The cardiomediastinal silhouette is unremarkable. | Enlarged Cardiomediastinum=0, Cardiomegaly=0
Enlarged cardiomediastinal silhouette. | Enlarged Cardiomediastinum=1, Cardiomegaly=-1
Heart and mediastinum are normal. | Cardiomegaly=0, Enlarged Cardiomediastinum=0
Normal heart size and mediastinal contours. | Cardiomegaly=0, Enlarged Cardiomediastinum=0
Heart size, mediastinum and pulmonary vessels are normal. | Cardiomegaly=0, Enlarged Cardiomediastinum=0, Edema=0
Heart size is normal and the lungs are clear. | Cardiomegaly=0, Lung Opacity=0, Consolidation=0
Normal heart size, lungs are hyperexpanded. | Cardiomegaly=0
The lungs are hyperexpanded and the heart is normal. | Cardiomegaly=0
The aorta is enlarged and the heart is normal. | Cardiomegaly=0
The cardiomediastinal silhouette is stable. |
Enlarged hilar lymph nodes. |
Pulmonary vasculature is normal. | Edema=0
Pulmonary vascular congestion. | Edema=1
Prominent central pulmonary vasculature. | Edema=1
The lungs are clear. | Lung Opacity=0, Consolidation=0
Both lungs are expanded and clear. | Lung Opacity=0, Consolidation=0
The right lung is clear. |
The pleural spaces are clear. | Pneumothorax=0, Pleural Effusion=0
Costophrenic angles are sharp. | Pleural Effusion=0
Blunting of the left costophrenic angle. | Pleural Effusion=-1
No blunting of the costophrenic angles. | Pleural Effusion=0
The bony thorax is intact. | Fracture=0
No acute osseous abnormality. | Fracture=0
No acute displaced rib fracture. | Fracture=0
Old healed fracture of the left clavicle. | Fracture=1
Fractured sternotomy wires. | Support Devices=1
No acute cardiopulmonary abnormality. | No Finding=1
No evidence of active disease. | No Finding=1
Normal chest. | No Finding=1
Negative chest radiograph. | No Finding=1
Chest radiograph is within normal limits. | No Finding=1
Both lungs show no acute abnormality. | Lung Opacity=0, Consolidation=0
No atelectasis, mass or fracture. | Atelectasis=0, Lung Lesion=0, Fracture=0
No pleural thickening is seen. | Pleural Other=0
Stable cardiomegaly without acute disease. | Cardiomegaly=1
No significant change from the prior study. |
No acute airspace disease. | Lung Opacity=0
Calcified granuloma in the right upper lobe. | Lung Lesion=1
Nodular opacity at the left apex. | Lung Lesion=1, Lung Opacity=1
Biapical pleural thickening. | Pleural Other=1
Left pleural plaques without effusion. | Pleural Other=1, Pleural Effusion=0
Hydropneumothorax on the right. | Pneumothorax=1, Pleural Effusion=1
Small pericardial effusion. |
Right upper lobe volume loss. | Atelectasis=1
Left lung collapse. | Atelectasis=1
Prominent interstitial markings. | Lung Opacity=1
Right internal jugular catheter with tip in the SVC. | Support Devices=1
Left chest pacemaker with leads in the right atrium and ventricle. | Support Devices=1
Median sternotomy wires and surgical clips. | Support Devices=1
Plate-like atelectasis at the bases. | Atelectasis=1
Tracheostomy tube in place, no pneumothorax. | Support Devices=1, Pneumothorax=0
Endplate degenerative changes of the spine. |
Lung volumes are low. |
The trachea is midline. |
Degenerative changes with no nodule or mass. | Lung Lesion=0
No pneumothorax or possible effusion. | Pneumothorax=0, Pleural Effusion=0
No suspicious nodules, masses or lymphadenopathy. | Lung Lesion=0
Non-displaced rib fracture. | Fracture=1
HEART IS ENLARGED; LUNGS ARE CLEAR. | Cardiomegaly=1, Lung Opacity=0, Consolidation=0
Left-sided effusion is unchanged, no new opacity. | Pleural Effusion=1, Lung Opacity=0
There is no focal opacity, and the heart is enlarged. | Lung Opacity=0, Cardiomegaly=1
Atelectasis is present but pneumonia is not excluded. | Atelectasis=1, Pneumonia=-1
Lungs are not clear. |
Left lower lobe infiltrate or pneumonia with effusion. | Lung Opacity=-1, Pneumonia=-1, Pleural Effusion=1
No other nodules. |
Heart: normal size. | Cardiomegaly=0
No pneumothorax. Small effusion. | Pneumothorax=0, Pleural Effusion=1
Stable moderate cardiac enlargement. | Cardiomegaly=1
There may be mild enlargement of the cardiac silhouette. | Cardiomegaly=-1
Widening of the superior mediastinum. | Enlarged Cardiomediastinum=1
A ground-glass opacity cannot be excluded. | Lung Opacity=-1
Consolidation with air bronchograms is suspected. | Consolidation=-1
Effusion, consolidation and pneumothorax are not seen. | Pleural Effusion=0, Consolidation=0, Pneumothorax=0
Small effusion, pneumothorax is not seen. | Pleural Effusion=1, Pneumothorax=0
No effusion, left base opacity may represent pneumonia. | Pleural Effusion=0, Lung Opacity=1, Pneumonia=-1
The heart is large. | Cardiomegaly=1
Large heart, clear lungs. | Cardiomegaly=1, Lung Opacity=0, Consolidation=0
Heart size is stable, large hiatal hernia. |
The heart is normal and there is a large effusion. | Cardiomegaly=0, Pleural Effusion=1
The pulmonary XXXX are engorged. | Edema=1
Interstitial edema pattern. | Edema=1
Aspiration pneumonitis. | Pneumonia=1
Radiation pneumonitis. |
Left apical pleural thickening or scarring. | Pleural Other=1
Biapical nodular thickening. | Pleural Other=1
Densities, left lung base. | Lung Opacity=1
Density at the left costophrenic angle. | Lung Opacity=1
Calcified splenic granulomas. |
Granulomas within the liver. |
Soft tissue mass of the abdomen and a lung mass. | Lung Lesion=1
The tip lies outside the thoracic cavity. |
Nodular densities over both bases consistent with nipple shadows. |
No nodule, nipple shadows are seen. | Lung Lesion=0
Limited evaluation of the aortic stent. | Support Devices=1
Surgical XXXX overlie the abdomen. | Support Devices=1
The lungs are clear airspace disease. | Lung Opacity=0, Consolidation=0
The effusion has nearly resolved. | Pleural Effusion=1
Almost completely resolved right pneumothorax. | Pneumothorax=1
Effusion nearly resolved. | Pleural Effusion=1
The effusion has not resolved. | Pleural Effusion=1
No resolution of the effusion. | Pleural Effusion=1
The opacity has not cleared. | Lung Opacity=1
The catheter has not been removed. | Support Devices=1
Consolidation, atelectasis and effusion have cleared. | Consolidation=0, Atelectasis=0, Pleural Effusion=0
The previously seen effusion has resolved. | Pleural Effusion=0
Previously noted opacity is no longer identified. | Lung Opacity=0
No longer seen is the right effusion. | Pleural Effusion=0
Small nodule, not seen on the prior radiograph. | Lung Lesion=1
There is no longer a pneumothorax. | Pneumothorax=0
No residual pneumothorax. | Pneumothorax=0
Not without effusion. | Pleural Effusion=1
No right effusion, small left effusion. | Pleural Effusion=1
No pneumothorax on the left, small effusion on the right. | Pneumothorax=0, Pleural Effusion=1
The right effusion has resolved, the left effusion persists. | Pleural Effusion=1
No effusion on either side. | Pleural Effusion=0
No effusion, consolidation, pneumothorax. | Pleural Effusion=0, Consolidation=0, Pneumothorax=0
No effusion and no pneumothorax. | Pleural Effusion=0, Pneumothorax=0
No effusion/pneumothorax. | Pleural Effusion=0, Pneumothorax=0
Pneumothorax: absent. Effusion: small. | Pneumothorax=0, Pleural Effusion=1
Pneumonia cannot be ruled out. | Pneumonia=-1
The possibility of pneumonia cannot be entirely excluded. | Pneumonia=-1
Opacity thought to reflect atelectasis. | Lung Opacity=1, Atelectasis=-1
Atelectasis rather than pneumonia. | Atelectasis=1, Pneumonia=-1
Compatible with but not diagnostic of pneumonia. | Pneumonia=-1
Doubtful left effusion. | Pleural Effusion=-1
Atypical infection is another consideration. | Pneumonia=-1
Differential considerations include infection and mild edema. | Pneumonia=-1, Edema=-1
In the appropriate clinical setting this is compatible with pneumonia. | Pneumonia=-1
R/o pneumothorax. |
Correlate clinically for signs of infection. |
Patient with known history of lung cancer. |
History of pneumonia, now with effusion. | Pleural Effusion=1
Status post treatment for pneumonia. |
Scarring from prior tuberculous infection. | Lung Opacity=1
Prior fracture of the left clavicle. | Fracture=1
Computed tomography is more sensitive for small nodules. |
In case of pneumothorax a chest tube is advised. |
Should pneumothorax be suspected, repeat the film. |
Edema should be considered. | Edema=-1
The bony structures are intact with no acute abnormality. | Fracture=0
No acute abnormality of the chest. | No Finding=1
No abnormality of the ribs. |
Cardiomegaly with no failure or pneumonia. | Cardiomegaly=1, Pneumonia=0
Probably normal study. | No Finding=-1
Abnormal chest radiograph. | No Finding=0
"""


def table() -> list[tuple[str, dict[str, int]]]:
    rows = []
    for line in SENTENCES.strip().splitlines():
        sentence, _, listed = line.rpartition("|")
        labels = (label.split("=") for label in listed.split(",") if label.strip())
        rows.append((sentence.strip(), {name.strip(): int(value) for name, value in labels}))
    return rows


@pytest.mark.parametrize("sentence, labels", table())
def test_sentence(sentence: str, labels: dict[str, int]) -> None:
    assert label_sentence(sentence) == labels
    assert (
        label_sentence(f"  {sentence.upper().rstrip('.')}\n") == labels
    )  # neither case nor blanks nor the stop matter


def test_the_table_is_about_every_label_and_state() -> None:
    seen = {(name, value) for _, labels in table() for name, value in labels.items()}
    for name in CHEXPERT14:
        assert (name, PRESENT) in seen
        assert (name, ABSENT) in seen
    assert {name for name, value in seen if value == UNCERTAIN} >= {"Pneumonia", "Edema", "Atelectasis", "Lung Lesion"}


@pytest.mark.parametrize(
    "report, no_finding",
    [
        (["The lungs are clear."], 1),
        (["No pneumothorax."], 1),
        (["No acute cardiopulmonary abnormality."], 1),
        (["The spine is degenerative.", "Normal chest."], 1),
        (["Sternotomy wires.", "No effusion."], 1),
        (["Cardiomegaly.", "No acute cardiopulmonary abnormality."], 0),
        (["Possible effusion.", "No acute cardiopulmonary abnormality."], -1),
        (["Possible effusion.", "Cardiomegaly."], 0),
        (["Sternotomy wires."], None),
        (["Two views of the chest."], None),
        (["Heart size is normal.", "Probably normal study."], -1),
        (["Abnormal study.", "No effusion."], 0),
        ([], None),
    ],
)
def test_no_finding_follows_from_the_others(report: list[str], no_finding: int | None) -> None:
    labels = label_report(report)
    assert list(labels) == list(CHEXPERT14)
    assert labels[NO_FINDING] == no_finding


def test_present_wins_over_uncertain_over_absent() -> None:
    assert label_report(["No effusion.", "Possible effusion."])["Pleural Effusion"] == UNCERTAIN
    assert label_report(["Possible effusion.", "Small effusion.", "No effusion."])["Pleural Effusion"] == PRESENT
    assert label_report(["No effusion."])["Pleural Effusion"] == ABSENT
    assert label_report(["Clear lungs."])["Pleural Effusion"] is None
    assert combine_labels([{"Edema": None}])["Edema"] is None


def test_a_report_is_text_or_sections_or_sentences() -> None:
    text = "INDICATION: Pneumonia, rib fracture. FINDINGS: Small left effusion. IMPRESSION: 1. Effusion. 2. No edema."
    sections = {"indication": "Pneumonia.", "findings": "Small left effusion.", "impression": "No edema."}
    labels = label_report(text)
    assert labels == label_report(sections) == label_report(["Small left effusion.", "No edema."])
    assert (labels["Pleural Effusion"], labels["Edema"], labels["Pneumonia"], labels["Fracture"]) == (1, 0, None, None)
    assert labelled_sentences(sections) == [
        {"text": "Small left effusion.", "labels": {"Pleural Effusion": 1}},
        {"text": "No edema.", "labels": {"Edema": 0}},
    ]


WORDS = st.sampled_from(
    ("no", "without", "possible", "may represent", "cannot be excluded", "is not seen", "no change in", "resolved",
     "if", "and", "or", ",", ";", ":", "?", "/", "with", "but", "versus", "are", "is", "clear", "normal", "enlarged",
     "the", "effusion", "pneumonia", "cardiomegaly", "opacity", "catheter", "heart", "lungs", "mediastinum", "XXXX")
)  # fmt: skip


@given(st.one_of(st.text(max_size=120), st.lists(WORDS, max_size=25).map(" ".join)))
def test_any_text_gets_legal_labels(text: str) -> None:
    labels = label_sentence(text)
    assert set(labels) <= set(CHEXPERT14)
    assert set(labels.values()) <= {PRESENT, ABSENT, UNCERTAIN}
    if NO_FINDING in labels:
        assert all(value == ABSENT for name, value in labels.items() if name not in (NO_FINDING, SUPPORT_DEVICES))
    assert set(label_report(text)) == set(CHEXPERT14)


@given(
    st.sampled_from(("effusion", "pneumothorax", "consolidation", "edema", "pneumonia", "cardiomegaly", "atelectasis"))
)
def test_negation_and_doubt_work_for_every_finding(finding: str) -> None:
    (name,) = label_sentence(f"There is {finding}.")
    assert label_sentence(f"No {finding}.") == {name: ABSENT}
    assert label_sentence(f"No evidence of {finding} is seen.") == {name: ABSENT}
    assert label_sentence(f"Possible {finding}.") == {name: UNCERTAIN}
    assert label_sentence(f"{finding} cannot be excluded.") == {name: UNCERTAIN}
    assert label_sentence(f"No change in {finding}.") == {name: PRESENT}


@pytest.mark.parametrize(
    "sentence", ["effusion or " * 2000, "no, " * 3000, "heart normal " * 2000, "a" * 20000, "- " * 5000]
)
def test_long_lines_are_read_in_linear_time(sentence: str) -> None:
    label_sentence(sentence)  # a quadratic rule would take minutes here
