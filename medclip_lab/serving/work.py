"""The way of a request through the house: images decoded, prompts made a scorer, both through the towers."""

import asyncio
import math
import time
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.data.prompts import PromptConfig
from medclip_lab.inference.classifier import ZeroShotClassifier
from medclip_lab.inference.labelset import LabelPrompts, LabelSet
from medclip_lab.serving.batcher import Timed
from medclip_lab.serving.house import House, Making, Visit, prompt_key
from medclip_lab.serving.images import Prepared, from_base64, prepare
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import Sent
from medclip_lab.serving.schemas import LabelIn, Labels
from medclip_lab.serving.scoring import OneOfAll, PerLabel, Scorer

Floats = NDArray[np.float32]
PROMPTS = PromptConfig()


async def decode(house: House, visit: Visit, images: Sequence[Sent]) -> list[Prepared | Problem]:
    """Every image, or why it cannot be used, in their order.

    Raises:
        Problem: 413 for too many images, and where there is none that can be used, what is wrong with the first.
    """
    if len(images) > house.settings.max_images:
        raise Problem(413, "too-many-images", f"a request may have {house.settings.max_images} images: send several")
    start = time.monotonic()
    visit.images += len(images)
    found = await asyncio.gather(*(_decode(house, image) for image in images), return_exceptions=True)
    visit.stages["decode"] += time.monotonic() - start
    prepared: list[Prepared | Problem] = []
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, Problem):
            raise one
        prepared.append(one)
    if prepared and all(isinstance(one, Problem) for one in prepared):
        raise next(one for one in prepared if isinstance(one, Problem))
    return prepared


async def decode_one(house: House, visit: Visit, images: Sequence[Sent]) -> Prepared:
    """The only image of a request."""
    (found,) = await decode(house, visit, images)
    assert isinstance(found, Prepared)
    return found


async def _decode(house: House, image: Sent) -> Prepared:
    loop = asyncio.get_running_loop()

    def work(data: bytes | None) -> Prepared:
        with house.cores.decoding():
            content = from_base64(image.item.data or "") if data is None else data
            return prepare(content, image.item.frame, house.model.preprocess, house.limits)

    if image.item.dicomweb is None:
        return await loop.run_in_executor(house.pool, work, image.data)
    async with house.pulls:
        data = await loop.run_in_executor(house.pullers, house.archives.fetch, image.item.dicomweb)
        return await loop.run_in_executor(house.pool, work, data)


async def encode_images(
    house: House, visit: Visit, images: Sequence[Prepared], scorer: Scorer | None = None
) -> list[tuple[Floats, Any]]:
    """For each image its features [D], and the scorer's answer if there is one."""
    waiting = [house.batcher.submit("image", (image.pixels, scorer), visit.deadline) for image in images]
    return _note(visit, await asyncio.gather(*waiting))


async def encode_texts(house: House, visit: Visit, texts: Sequence[str], deadline: float | None = None) -> list[Floats]:
    """[D] features of each text; the deadline is the visit's, unless another is given."""
    waiting = [house.batcher.submit("text", text, deadline or visit.deadline) for text in texts]
    return _note(visit, await asyncio.gather(*waiting))


async def call(house: House, visit: Visit, function: Any) -> Any:
    """What a function gives that has to run on the model's thread."""
    return _note(visit, [await house.batcher.submit("call", function, visit.deadline)])[0]


def _note(visit: Visit, timed: Sequence[Timed[Any]]) -> list[Any]:
    """Values that went side by side take as long as the slowest of them."""
    if timed:
        visit.stages["queue"] += max(one.queue for one in timed)
        visit.stages["model"] += max(one.model for one in timed)
    return [one.value for one in timed]


async def scorer_for(house: House, visit: Visit, labels: Labels) -> Scorer:
    """What judges images by a set of the bundle, or by labels of the request's own.

    Raises:
        Problem: 404 for an unknown set, 422 for labels that cannot be used.
    """
    if labels.candidate_labels is None:
        labelset = named_labelset(house, labels.labelset)
        key = ("bundle", labelset.name, labels.multi_label)
    else:
        labelset = own_labelset(house, labels)
        key = ("own", labelset.hash, labels.multi_label)
    found = house.scorers.get(key)
    if found is not None:
        if labels.candidate_labels is not None:
            house.metrics.prompts.labels("hit").inc(len(_prompts(labelset)))
        return found
    # Many who ask for the same at once wait for one that is made, as long as any of them is there.
    making = house.making.get(key)
    if making is None:
        making = house.making[key] = Making(asyncio.ensure_future(_make_scorer(house, visit, labels, labelset)))
        making.task.add_done_callback(lambda done: _made(house, key, done))
    making.waiting += 1
    try:
        return await asyncio.shield(making.task)
    finally:
        making.waiting -= 1
        if not making.waiting:
            making.task.cancel()
            house.making.pop(key, None)


async def _make_scorer(house: House, visit: Visit, labels: Labels, labelset: LabelSet) -> Scorer:
    encoder = house.model.encoder
    if labels.candidate_labels is None:
        classifier = house.model.classifiers[labelset.name]
    else:
        features = await _prompt_features(house, visit, labelset)
        classifier = ZeroShotClassifier.from_prompts(
            labelset,
            lambda texts: np.stack([features[text] for text in texts]),
            encoder.logit_scale,
            encoder.logit_bias,
        )
    if labels.multi_label:
        return PerLabel(classifier)
    if classifier.none_of:
        told = ", ".join(classifier.none_of)
        raise Problem(422, "no-prompts", f"{told} has no prompts to be one of several: leave multi_label true")
    return OneOfAll.of(classifier)


def _made(house: House, key: Hashable, done: "asyncio.Task[Scorer]") -> None:
    if not done.cancelled() and done.exception() is None:
        house.scorers.put(key, done.result())


def named_labelset(house: House, name: str | None) -> LabelSet:
    """A label set of the bundle; None is the default."""
    known = house.model.labelsets
    name = name or house.model.labelset
    if name is None or name not in known:
        told = ", ".join(known) or "none: send candidate_labels"
        raise Problem(404, "unknown-labelset", f"the bundle has no such label set; it has {told}")
    return known[name]


def own_labelset(house: House, labels: Labels) -> LabelSet:
    """The labels of a request, with their prompts."""
    given = labels.candidate_labels or []
    settings = house.settings
    if len(given) > settings.max_labels:
        raise Problem(422, "too-many-labels", f"a request may have {settings.max_labels} labels: send several")
    made = []
    for place, label in enumerate(given):
        own = label if isinstance(label, LabelIn) else LabelIn.model_construct(name=label, positive=[], negative=[])
        positive = own.positive or _filled(labels.templates or PROMPTS.present, own.name)
        # Which one of several is asked without what speaks against each.
        against = own.negative or _filled(labels.negative_templates or PROMPTS.absent, own.name)
        negative = against if labels.multi_label else []
        if max(len(positive), len(negative)) > settings.max_prompts:
            raise Problem(
                422, "too-many-prompts", f"candidate_labels.{place}: a label may have {settings.max_prompts} prompts"
            )
        made.append(LabelPrompts(own.name.strip(), positive, negative))
    if len({label.name for label in made}) < len(made):
        raise Problem(422, "label-twice", "candidate_labels: a name stands twice: give each label once")
    try:
        return LabelSet("request", made, exclusive=not labels.multi_label)
    except ValueError:
        raise Problem(
            422,
            "says-nothing",
            'candidate_labels: a prompt is blank or denies a denial, as "no no finding": give such a label sentences '
            "of its own, for it and against it",
        ) from None


def _filled(templates: Sequence[str], name: str) -> list[str]:
    texts = [template.replace("{}", name.strip()) for template in templates]
    return [text[:1].upper() + text[1:] for text in texts]


def _prompts(labelset: LabelSet) -> list[str]:
    texts = (text for label in labelset.labels for text in (*label.positive, *label.negative))
    return list(dict.fromkeys(texts))


async def _prompt_features(house: House, visit: Visit, labelset: LabelSet) -> dict[str, Floats]:
    """Features of every prompt, from the cache where it was met before."""
    features = {}
    missing = []
    for text in _prompts(labelset):
        known = house.prompts.get(prompt_key(text))
        if known is None:
            missing.append(text)
        else:
            features[text] = known
    house.metrics.prompts.labels("hit").inc(len(features))
    house.metrics.prompts.labels("miss").inc(len(missing))
    if missing:
        await asyncio.to_thread(_check_length, house, labelset, frozenset(missing))
        # Others may wait for it who have more time than who asked first; each leaves at a deadline of its own.
        rows = await encode_texts(house, visit, missing, math.inf)
        for text, row in zip(missing, rows, strict=True):
            features[text] = row
            house.prompts.put(prompt_key(text), row)
    return features


def _check_length(house: House, labelset: LabelSet, texts: frozenset[str]) -> None:
    """Refuse prompts that the text tower would cut: what it cuts may be the finding."""
    for place, label in enumerate(labelset.labels):
        for text in {*label.positive, *label.negative} & texts:
            tokens, context = house.model.tokens(text)
            if tokens > context:
                raise Problem(
                    422,
                    "label-too-long",
                    f"candidate_labels.{place}: a prompt has {tokens} tokens, and the text tower reads {context}: "
                    "shorten the label or its templates",
                )
