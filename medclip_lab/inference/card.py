"""The model card of a bundle: Hugging Face's metadata, and what a reader must know before using a model.

Metadata follow https://github.com/huggingface/hub-docs/blob/main/modelcard.md; the sections follow Mitchell et al.,
"Model Cards for Model Reporting" (FAT* 2019). What nobody stated stands there as not stated; nothing is guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from medclip_lab.errors import UserError
from medclip_lab.files import read_json
from medclip_lab.models.spec import beyond_open_clip

CONTROLS = ("shuffled_labels", "blur", "ensemble")
"""Of results: what makes them figures of something else than the model."""


@dataclass(frozen=True)
class CardFacts:
    """What only people can state; each is "not stated" until they do."""

    name: str | None = None
    """Of the model, for its model index; None takes the name of the bundle's folder."""
    license: str | None = None
    """Of the weights, as the Hub writes it ("apache-2.0", "cc-by-nc-4.0", "other"). None is the Hub's "unknown"."""
    license_name: str | None = None
    """With "other": what it is called."""
    license_link: str | None = None
    """With "other": where it stands, a file of the bundle or a URL."""
    languages: list[str] = field(default_factory=list)
    """Of the reports, as ISO 639-1 codes."""
    datasets: list[str] = field(default_factory=list)
    """Of the training, as ids of the Hub; leave out what is not there."""
    base_model: str | None = None
    """Id on the Hub of the model that the weights started from."""
    developers: str | None = None
    contact: str | None = None
    intended_use: str | None = None
    """For what, by whom, on which patients and images."""
    out_of_scope: str | None = None
    """What it must not be used for."""
    limits: str | None = None
    """Known limits and biases."""
    training_data: str | None = None
    """Where from, which years and patients, how selected, under which terms."""

    def __post_init__(self) -> None:
        if self.license == "other" and not self.license_name:
            raise ValueError("license 'other' needs a license_name, and a license_link to its text")
        if self.license != "other" and (self.license_name or self.license_link):
            raise ValueError("license_name and license_link belong to the license 'other'")
        for name in self.languages:
            if not re.fullmatch(r"[a-z]{2,3}", name):
                raise ValueError(f"languages: {name!r} is no ISO 639 code such as 'en'")


@dataclass(frozen=True)
class Evaluation:
    """Results of `medclip-lab evaluate` on one data set."""

    name: str
    """Of the data, as its user calls it."""
    results: dict[str, Any]

    @classmethod
    def read(cls, path: Path, name: str | None, fingerprint: str) -> "Evaluation":
        """From a file that `evaluate --out` wrote.

        Args:
            name: None takes the protocol's, or the beginning of the digest of the shards.

        Raises:
            UserError: no such file, another model's results, those of a control, or none that a card has room for.
        """
        results = read_json(path, "evaluation")
        if results.get("bundle") != fingerprint:
            told = str(results.get("bundle"))[:12]
            raise UserError(f"evaluation: {path} is of model {told}, not of {fingerprint[:12]}: evaluate this bundle")
        for control in CONTROLS:
            if results.get(control):
                raise UserError(f"evaluation: {path} was made with {control}: a card shows the model itself")
        if not results.get("zero_shot") and not results.get("retrieval"):
            raise UserError(f"evaluation: {path} holds neither zero-shot nor retrieval figures")
        protocol = results.get("protocol", {}).get("name")
        return cls(name or protocol or f"shards {results['shards'][:12]}", results)

    @property
    def split(self) -> str:
        return str(self.results.get("split") or self.results["protocol"]["split"])


def card_text(
    *,
    fingerprint: str,
    model_cfg: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    labelsets: list[str],
    run: Mapping[str, Any],
    calibrations: Mapping[str, Any],
    stated: CardFacts,
    name: str,
    evaluations: list[Evaluation],
) -> str:
    """The card, Markdown under YAML.

    Args:
        model_cfg: open_clip's, with the config of a text tower of Hugging Face in it.
        preprocess: of `preprocess.json`.
        run: facts of the training, by name; empty if nothing is known.
        calibrations: of `calibration.json`, by label set.
        name: of the model if nothing else is stated.
    """
    beyond = beyond_open_clip(dict(model_cfg))
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701 - Markdown; what could leave its cell is replaced by `cell`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": cell, "number": number}
    template = (files("medclip_lab.inference") / "card.md.j2").read_text(encoding="utf-8")
    body = environment.from_string(template).render(
        name=cell(stated.name or name),
        fingerprint=fingerprint,
        towers=_towers(model_cfg),
        size=" x ".join(map(str, preprocess["size"])),
        context=model_cfg["text_cfg"].get("context_length", "the tower's own"),
        labelsets=labelsets,
        run=run,
        calibrations=calibrations,
        stated=stated,
        evaluations=evaluations,
        beyond=beyond,
        in_folder="hf_config" in model_cfg["text_cfg"],
    )
    return f"---\n{_metadata(stated, stated.name or name, beyond, evaluations)}\n---\n{body}"


def _metadata(stated: CardFacts, name: str, beyond: list[str], evaluations: list[Evaluation]) -> str:
    from huggingface_hub import ModelCardData

    results = [result for evaluation in evaluations for result in _results(evaluation)]
    data = ModelCardData(
        license=stated.license or "unknown",
        license_name=stated.license_name,
        license_link=stated.license_link,
        language=stated.languages or None,
        library_name="medclip_lab" if beyond else "open_clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["medical", "radiology", "clip", "contrastive", "image-text-retrieval", "not-a-medical-device"],
        datasets=stated.datasets or None,
        base_model=stated.base_model,
        metrics=["roc_auc"] if any(result.metric_type == "roc_auc" for result in results) else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _results(evaluation: Evaluation) -> list[Any]:
    """Of huggingface_hub: the mean AUROC, and recall in both directions."""
    from huggingface_hub import EvalResult

    found = evaluation.results
    data: dict[str, Any] = {
        "dataset_name": evaluation.name,
        "dataset_type": re.sub(r"[^a-z0-9]+", "-", evaluation.name.lower()).strip("-") or "data",
        "dataset_split": evaluation.split,
        "dataset_revision": found["shards"],
    }
    results = []
    if shot := found.get("zero_shot"):
        macro = shot["macro"]
        results.append(
            EvalResult(
                task_type="zero-shot-image-classification",
                metric_type="roc_auc",
                metric_name=f"mean AUROC of {macro['labels']} labels of {shot['labelset']}",
                metric_value=macro["auroc"],
                metric_args={"low": macro["low"], "high": macro["high"], "level": 0.95},
                **data,
            )
        )
    for direction, measured in (found.get("retrieval") or {}).items():
        if isinstance(measured, dict) and "recall" in measured:
            results += [
                EvalResult(
                    task_type="image-text-retrieval",
                    metric_type=f"recall_at_{k}",
                    metric_name=f"{direction.replace('_', ' ')} R@{k} of {measured['gallery']}",
                    metric_value=value,
                    **data,
                )
                for k, value in measured["recall"].items()
            ]
    return results


def _towers(model_cfg: Mapping[str, Any]) -> str:
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    image = vision.get("timm_model_name") or f"open_clip's, {vision.get('layers')} layers of {vision.get('width')}"
    other = "Hugging Face's" if "hf_model_name" in text else "open_clip's"
    return f"{image} for images, {other} transformer for texts, {model_cfg['embed_dim']} dimensions"


def cell(value: Any) -> str:
    """A value in one line that ends no cell of a table and begins no tag."""
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"
