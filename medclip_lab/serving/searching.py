"""A search, from what was asked to hits: query, index, conditions, policy; every refusal says what to change."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.retrieval.filters import Condition, FilterError, parse
from medclip_lab.retrieval.milvus_client import AwayError
from medclip_lab.retrieval.policies import AtLeast, Policy, Ratio
from medclip_lab.retrieval.search import Hit, Store
from medclip_lab.serving.house import House, Visit
from medclip_lab.serving.indexes import TEXT, Served
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.reading import Asked
from medclip_lab.serving.schemas import SearchIn
from medclip_lab.serving.work import decode_one, encode_images, encode_texts

LARGE = 1e100
"""Beyond this a square is no finite number."""
RATIO = 1.5
"""Of the policy `ratio`, where a request names none."""


@dataclass(frozen=True)
class Query:
    """What is looked for."""

    vector: NDArray[np.float32] | None
    """[D], unit norm; None for a row of the index itself."""
    direction: str | None
    """"image" or "text"; None for a vector, which may be of either."""
    facts: Any = None
    """What was done to the pixels of an image."""


@dataclass(frozen=True)
class Found:
    """What was found, and where."""

    hits: list[Hit]
    index: dict[str, Any]
    """As `Served.facts`."""


async def query_of(house: House, visit: Visit, asked: Asked[SearchIn]) -> Query:
    """The vector of what a request brings.

    Raises:
        Problem: 422 for a vector that cannot be; see `decode_one`.
    """
    if asked.images:
        image = await decode_one(house, visit, asked.images)
        return Query((await encode_images(house, visit, [image]))[0][0], "image", image.facts)
    if asked.body.text is not None:
        return Query((await encode_texts(house, visit, [asked.body.text]))[0], "text")
    if asked.body.vector is None:
        return Query(None, None)
    vector = np.asarray(asked.body.vector, dtype=np.float64)
    norm = float(np.linalg.norm(vector)) if np.abs(vector).max() < LARGE else 0.0
    if len(vector) != house.dim or norm < 1e-6:
        raise Problem(422, "vector", f"a vector must have {house.dim} numbers below {LARGE:g} that are not all 0")
    return Query((vector / norm).astype(np.float32), None)


async def search(served: Served, query: Query, wanted: SearchIn, visit: Visit) -> Found:
    """Best first; on a thread, as an index is read from the disk or asked over a network.

    Raises:
        Problem: 403, 404 or 422; 503 where a server that holds the index does not answer.
    """
    start = time.monotonic()
    where = _conditions(wanted.where)
    if any(condition.column in TEXT for condition in where):
        visit.need("text")  # answers would tell by what they leave out what a report says
    found = await asyncio.to_thread(_search, served, query, wanted, where, visit)
    visit.stages["search"] = time.monotonic() - start
    return found


def _conditions(written: list[str]) -> list[Condition]:
    found = []
    for place, text in enumerate(written):
        try:
            found.append(parse(text))
        except FilterError as error:
            raise Problem(422, "filter", f"where.{place}: {error.plain}") from None
    return found


def _search(served: Served, query: Query, wanted: SearchIn, where: list[Condition], visit: Visit) -> Found:
    try:
        domain = served.domain(wanted.domain, None if query.direction == "text" else query.vector)
        store = served.stores[domain]
        visit.index = served.hash(domain)
        if wanted.include_text and not store.manifest.get("text_included"):
            raise Problem(
                422, "no-text", "this index holds no report text: leave include_text out, or build one with it"
            )
        vector = query.vector if query.vector is not None else _own(store, wanted)
        patient = wanted.not_patient if not wanted.other_patients else _patient(store, wanted)
        # What a query is, where it is known; a row is what its index holds.
        direction = query.direction or (str(store.manifest["modality"]) if wanted.id is not None else None)
        hits = store.search(
            vector,
            wanted.k,
            where=where,
            not_patients=None if patient is None else [patient],
            not_ids=None if wanted.id is None else [wanted.id],
            policy=_policy(served, store, wanted, direction, patient is not None),
            with_text=wanted.include_text,
            # What was not measured is searched as thoroughly as the hardest direction that was.
            direction=direction if direction in store.manifest.get("parameters", ()) else None,
        )[0]
        return Found(hits, served.facts(domain))
    except AwayError:
        raise Problem(503, "index-away", "the server of this index does not answer: send it again later") from None
    except FilterError as error:
        raise Problem(422, "filter", f"where: {error.plain}") from None


def _own(store: Store, wanted: SearchIn) -> NDArray[np.float32]:
    """The vector of a row, whose norm fewer bits may have changed."""
    assert wanted.id is not None
    try:
        vector = store.vectors([wanted.id])[0]
    except AwayError:
        raise
    except UserError:
        raise Problem(404, "unknown-id", "the index holds no such id: take one from the hits of a search") from None
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)


def _patient(store: Store, wanted: SearchIn) -> str:
    assert wanted.id is not None
    patient = store.rows([wanted.id])[0].get("patient_id")
    if patient is None:
        raise Problem(422, "no-patient", "the row has no patient: leave other_patients out")
    return str(patient)


def _policy(served: Served, store: Store, wanted: SearchIn, direction: str | None, others: bool) -> Policy | None:
    """How many are kept.

    Raises:
        Problem: 422 for a calibration that holds for other answers, or for none.
    """
    if wanted.policy != "calibrated":
        ratio = wanted.ratio if wanted.ratio is not None else RATIO if wanted.policy == "ratio" else None
        policy = None if ratio is None else Ratio(ratio)
        return policy if wanted.min_score is None else AtLeast(wanted.min_score, policy)
    known = {name: one for name, one in served.calibrations.items() if one.vectors == store.fingerprint()}
    if not known:
        raise Problem(422, "no-calibration", "this index has no calibration: choose the policy fixed-k or ratio")
    if wanted.calibration is None and len(known) > 1:
        raise Problem(422, "calibration", f"name one of the calibrations as `calibration`: {', '.join(known)}")
    name = wanted.calibration or next(iter(known))
    if name not in known:
        raise Problem(404, "unknown-calibration", f"the index has no such calibration; it has {', '.join(known)}")
    asked = {"where": wanted.where, "k": wanted.k, "other_patients": others}
    differ = known[name].against(asked | ({} if direction is None else {"modality": direction}))
    if differ:
        held = " and for ".join(held for held, _ in differ)
        raise Problem(422, "calibration", f"the calibration holds for {held}: ask so, or choose another policy")
    return known[name].policy
