"""What may be asked, as JSON. Descriptions and examples here are those of the OpenAPI document."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"\S")]
Uid = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=64)]
Template = Annotated[str, StringConstraints(min_length=2, max_length=500, pattern=r"^[^{}]*\{\}[^{}]*$")]
Query = Annotated[str, StringConstraints(min_length=1, max_length=20_000, pattern=r"\S")]
Written = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"\S")]
Id = Annotated[int, Field(ge=0, lt=2**63)]
Frame = Annotated[int, Field(ge=0, le=100_000)]
T = TypeVar("T")
Several = Annotated[list[T], Field(fail_fast=True)]
"""Ends at the first that is wrong: a list may have a hundred thousand."""

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNsYIAAJgaKGAAmCACQtTEKkQAAAABJRU5ErkJggg=="
"""A grey square of 8 x 8 pixels, for examples that can be sent as they stand."""


class Body(BaseModel):
    """Unknown fields are refused, and errors never carry the input."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


def shown(*examples: dict[str, Any]) -> ConfigDict:
    """What a kind of body adds to the configuration of all."""
    return ConfigDict(json_schema_extra={"examples": list(examples)})


class Instance(Body):
    """An instance in an archive that the service was allowed to ask."""

    server: Name = Field(description="name of the archive, as the service knows it")
    study: Uid
    series: Uid
    instance: Uid


class ImageIn(Body):
    """An image: its bytes, or where in an archive it lies."""

    data: str | None = Field(
        default=None, description="base64 of a PNG, JPEG, TIFF, WebP or DICOM file", examples=[PIXEL]
    )
    dicomweb: Instance | None = None
    frame: Frame | None = Field(default=None, description="which one, from 0, where the file has several")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.data is None) == (self.dicomweb is None):
            raise ValueError("give either data or dicomweb")
        return self


class LabelIn(Body):
    """A label and what is said for it and against it."""

    name: Name
    positive: Several[Query] = Field(min_length=1)
    negative: Several[Query] = Field(default=[])


class Labels(Body):
    """What to judge an image by: a set of the bundle, or labels of one's own."""

    labelset: Name | None = Field(
        default=None, description="of the bundle; without it and own labels, the service's default"
    )
    candidate_labels: Several[Name | LabelIn] | None = Field(
        default=None, min_length=1, description="own labels: names, or names with their prompts"
    )
    templates: Several[Template] | None = Field(
        default=None, min_length=1, description="prompts for own labels, {} being the name", examples=[["There is {}."]]
    )
    negative_templates: Several[Template] | None = Field(
        default=None, min_length=1, description="prompts against them", examples=[["There is no {}."]]
    )
    multi_label: bool = Field(
        default=True, description="true: each label apart; false: which one of them, scores sum to 1 (softmax)"
    )

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.labelset is not None and self.candidate_labels is not None:
            raise ValueError("give either labelset or candidate_labels")
        if self.candidate_labels is None and (self.templates or self.negative_templates):
            raise ValueError("templates are for candidate_labels: leave them out, or give labels")
        return self


class ClassifyIn(Labels):
    """Images and what to judge them by."""

    model_config = shown(
        {"images": [{"data": PIXEL}]},
        {
            "images": [{"data": PIXEL}],
            "candidate_labels": ["pleural effusion", "pneumothorax"],
            "templates": ["There is {}."],
            "negative_templates": ["There is no {}."],
        },
    )
    images: Several[ImageIn] = Field(min_length=1)
    preview: bool = Field(default=False, description="also answer with what the tower saw, a PNG in base64")


class EmbedIn(Body):
    """Images or texts to embed."""

    model_config = shown({"images": [{"data": PIXEL}]}, {"texts": ["Small left pleural effusion."]})
    images: Several[ImageIn] = Field(default=[])
    texts: Several[Query] = Field(default=[])
    encoding: Literal["float", "base64"] = Field(
        default="float", description="base64: of little-endian float32, row by row"
    )

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not self.images and not self.texts:
            raise ValueError("give images, texts or both")
        return self


class InIndex(Body):
    """Which index."""

    index: Name | None = Field(default=None, description="its name; not needed where there is one")
    domain: Name | None = Field(default=None, description="of a router; an image finds its own")


class SearchIn(InIndex):
    """A query: an image, a text, a vector of this bundle, or a row of the index."""

    model_config = shown(
        {"text": "left pleural effusion", "k": 5},
        {"image": {"data": PIXEL}, "where": ["sex in F,M"], "policy": "ratio", "ratio": 1.5},
        {"id": 0, "min_score": 0.2},
    )
    image: ImageIn | None = None
    text: Query | None = None
    vector: Several[Annotated[float, Field(allow_inf_nan=False)]] | None = Field(
        default=None, min_length=1, max_length=65_536, description="of this bundle; brought to unit norm"
    )
    id: Id | None = Field(default=None, description="of a row, which is no answer to itself")
    k: Annotated[int, Field(ge=1)] = Field(default=10, description="answers wanted")
    where: Several[Written] = Field(
        default=[],
        max_length=20,
        description='all of which an answer meets: "view=PA", "age>=60", "study_date<2020-01-31", "labels.Edema=1", '
        '"sex in F,M"',
    )
    not_patient: Name | None = Field(default=None, description="none of whose rows is an answer")
    other_patients: bool = Field(default=False, description="with id: nothing of the same patient")
    policy: Literal["fixed-k", "ratio", "calibrated"] = Field(
        default="fixed-k", description="how many of the k are kept: all, while best / score is below ratio, or as many "
        "as the risk of a calibration allows"
    )  # fmt: skip
    ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        default=None, description="answers end where the best score is this many times theirs; k is the most"
    )
    min_score: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        default=None, description="the least cosine of an answer"
    )
    calibration: Name | None = Field(default=None, description="its name, where an index has several")
    include_text: bool = Field(default=False, description="with the report text; needs the scope `text`")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.image, self.text, self.vector, self.id)) != 1:
            raise ValueError("give one of image, text, vector and id")
        if self.other_patients and (self.id is None or self.not_patient is not None):
            raise ValueError("other_patients is for id, and not_patient for other queries")
        if self.policy == "calibrated" and (self.ratio is not None or self.min_score is not None):
            raise ValueError("a calibration says itself how many are kept: leave ratio and min_score out")
        if self.policy != "calibrated" and self.calibration is not None:
            raise ValueError("calibration is for the policy calibrated")
        return self


class ThumbnailsIn(InIndex):
    """Rows to look at."""

    model_config = shown({"ids": [0]})
    ids: Several[Id] = Field(min_length=1, description="of rows, as hits have them")


class ExplainIn(Body):
    """An image and what to look for in it: a label of a set, or prompts."""

    model_config = shown({"image": {"data": PIXEL}, "label": "Edema"})
    image: ImageIn
    labelset: Name | None = None
    label: Name | None = Field(default=None, description="of the label set")
    positive: Several[Query] = Field(default=[], description="prompts, in place of a label")
    negative: Several[Query] = Field(default=[], description="prompts against")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.label is None) == (not self.positive):
            raise ValueError("give either label or positive")
        return self


class HuggingFaceParameters(Body):
    """As Hugging Face's task has them."""

    candidate_labels: Several[Name] = Field(min_length=1)
    hypothesis_template: Template | None = Field(default=None, examples=["This is a photo of {}."])
    multi_label: bool = False


class HuggingFaceIn(Body):
    """The request of Hugging Face's task zero-shot-image-classification."""

    model_config = shown({"inputs": PIXEL, "parameters": {"candidate_labels": ["effusion", "pneumothorax"]}})
    inputs: str = Field(description="base64 of an image file")
    parameters: HuggingFaceParameters


class InferInput(Body):
    """A tensor of the Open Inference Protocol."""

    name: Literal["image"]
    shape: Several[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=1)
    datatype: Literal["BYTES"]
    parameters: dict[str, Any] = {}
    data: Several[str] = Field(min_length=1, description="base64 of image files")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.shape != [len(self.data)]:
            raise ValueError("shape must be [number of images]")
        return self


class InferOutput(Body):
    """An output that is asked for."""

    name: Literal["scores", "labels", "features"]
    parameters: dict[str, Any] = {}


class InferParameters(Body):
    """Beside the tensors."""

    labelset: Name | None = None


class InferIn(Body):
    """The infer request of the Open Inference Protocol, version 2."""

    model_config = shown({"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [PIXEL]}]})
    id: Annotated[str, StringConstraints(max_length=200)] | None = None
    parameters: InferParameters = InferParameters()
    inputs: Several[InferInput] = Field(min_length=1, max_length=1)
    outputs: Several[InferOutput] = Field(default=[])
