"""Verbs that ask an index: search, and rag for what a generator is given."""

import argparse
import sys
from pathlib import Path
from typing import Any

from medclip_lab.cli.common import Verbs, add_verb, say
from medclip_lab.errors import UserError

RATIO = 1.5


def add_store(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("store")
    group.add_argument("--store", choices=("faiss", "milvus"), default="faiss", help="what holds it (default: faiss)")
    group.add_argument("--uri", default=None, help="of Milvus: a file, or http://host:19530; the index is a collection")


def milvus_uri(args: argparse.Namespace) -> str | None:
    """The URI, or None where FAISS is the store.

    Raises:
        UserError: one of --store milvus and --uri without the other.
    """
    if (args.store == "milvus") != (args.uri is not None):
        raise UserError("--store milvus and --uri go together")
    return str(args.uri) if args.uri is not None else None


def add_search(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "search",
        "the studies of an index that are nearest to a text or an image",
        'search bundle index --text "left pleural effusion" -k 5 --where view=PA --where "age>=60"',
        _run_search,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("index", help="a folder, a router's file, or a collection of Milvus")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text")
    query.add_argument("--image", type=Path)
    query.add_argument("--vector", type=Path, help="a .npy file of one unit vector")
    query.add_argument("--id", type=int, help="a row of the index, which is no answer to itself")
    parser.add_argument("-k", type=int, default=10, help="number of answers (default: 10)")
    _add_where(parser)
    parser.add_argument("--not-patient", default=None, help="a patient none of whose rows is an answer")
    parser.add_argument("--other-patients", action="store_true", help="with --id: nothing of the same patient")
    parser.add_argument("--with-text", action="store_true", help="show report text, if the index holds it")
    parser.add_argument("--with-vectors", action="store_true", help="with --json: the vector of each answer")
    parser.add_argument("--domain", default=None, help="of a router (default: that of the nearest mean of images)")
    _add_policy(parser)
    settings = parser.add_argument_group("parameters of this search (default: as tuned)")
    settings.add_argument("--nprobe", type=int, default=None, help="lists that are read")
    settings.add_argument("--ef-search", type=int, default=None, help="vertices that are kept in view")
    settings.add_argument("--k-factor", type=int, default=None, help="candidates that are reranked, for each answer")
    add_store(parser)


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help='view=PA, "age>=60", "study_date<2020-01-31", "labels.Edema=1", "sex in F,M"; all have to be met',
    )


def _add_policy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how many are kept")
    group.add_argument("--policy", choices=("fixed-k", "ratio", "calibrated"), default="fixed-k")
    group.add_argument("--ratio", type=float, help=f"kept while best / score is below it (default: {RATIO})")
    group.add_argument("--calibration", type=Path, default=None, help="what rag calibrate wrote")


def _policy(args: argparse.Namespace, store: Any, asked: dict[str, Any]) -> Any:
    """The policy that is asked for; None keeps all k. `asked` is as of `load_calibration`."""
    from medclip_lab.retrieval.policies import Ratio
    from medclip_lab.retrieval.risk import load_calibration

    if (args.policy == "calibrated") != (args.calibration is not None):
        raise UserError("--policy calibrated and --calibration go together")
    if args.ratio is not None and args.policy != "ratio":
        raise UserError("--ratio is for --policy ratio")
    if args.policy == "calibrated":
        return load_calibration(args.calibration, store.fingerprint(), asked | {"where": args.where, "k": args.k})
    return Ratio(RATIO if args.ratio is None else args.ratio) if args.policy == "ratio" else None


def _open(args: argparse.Namespace, fingerprint: str | None = None) -> Any:
    from medclip_lab.retrieval.index import open_index

    uri = milvus_uri(args)
    if uri is None:
        return open_index(args.index, fingerprint)
    from medclip_lab.retrieval.milvus import open_collection

    return open_collection(uri, args.index, fingerprint)


def _run_search(args: argparse.Namespace) -> None:
    from medclip_lab.inference.encoder import load
    from medclip_lab.retrieval.parameters import Parameters
    from medclip_lab.retrieval.router import open_router

    if args.with_vectors and not args.json:
        raise UserError("--with-vectors is for --json")
    encoder = load(args.bundle)
    direction = "text" if args.text is not None else "image" if args.image is not None else None
    query = None
    if direction is not None:
        query = encoder.encode_texts([args.text]) if direction == "text" else encoder.encode_images([args.image])
    elif args.vector is not None:
        query = _vector(args.vector)
    if args.store == "faiss" and Path(args.index).is_file():
        router = open_router(args.index, encoder.fingerprint)
        if query is None:
            raise UserError("search: --id names a row of one index, not of a router's")
        if args.domain is None and direction == "text":
            raise UserError(f"search: name the --domain of a text, one of {', '.join(router.indexes)}")
        store = router.index(args.domain or router.domains(query)[0])
    elif args.domain is not None:
        raise UserError("search: --domain is for a router, as rag route writes it")
    else:
        store = _open(args, encoder.fingerprint)
    patient = _patient(args, store)
    given = Parameters(nprobe=args.nprobe, ef_search=args.ef_search, k_factor=args.k_factor)
    if given.given() and args.policy == "calibrated":
        raise UserError(
            "--policy calibrated holds for answers searched for as they were tuned: leave --nprobe, --ef-search and "
            "--k-factor out"
        )
    hits = store.search(
        store.vectors([args.id]) if query is None else query,
        args.k,
        where=args.where,
        not_patients=[patient],
        not_ids=[args.id],
        policy=_policy(args, store, _asked(args, store, direction)),
        with_text=args.with_text,
        # What was not measured is searched as thoroughly as the hardest direction that was.
        direction=direction if direction in store.manifest.get("parameters", ()) else None,
        parameters=given if given.given() else None,
    )[0]
    lines = [f"{'rank':>4}  {'cosine':>6}  study"]
    for hit in hits:
        text = f"  {hit.row['text']}" if hit.row.get("text") else ""
        number = f" image {hit.row['image']}" if hit.row.get("image") else ""
        lines.append(f"{hit.rank:>4}  {hit.score:>6.3f}  {hit.study_id}{number}{text}")
    if len(hits) < args.k:
        why = "no other row can be an answer" if args.policy == "fixed-k" else "the policy keeps no more"
        print(f"{len(hits)} of {args.k}: {why}", file=sys.stderr)
    values = [{"rank": hit.rank, "score": hit.score, **hit.row} for hit in hits]
    if args.with_vectors and hits:
        vectors = store.vectors([hit.id for hit in hits])
        values = [value | {"vector": vector.tolist()} for value, vector in zip(values, vectors, strict=True)]
    say(args, values, "\n".join(lines))


def _asked(args: argparse.Namespace, store: Any, direction: str | None) -> dict[str, Any]:
    """Of a search what a calibration can be held to: what a --vector is of, nobody knows."""
    asked: dict[str, Any] = {"other_patients": args.other_patients or args.not_patient is not None}
    modality = store.manifest["modality"] if args.id is not None else direction
    return asked if modality is None else asked | {"modality": modality}


def _vector(path: Path) -> Any:
    import numpy as np

    try:
        vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        raise UserError(f"--vector: {path} is no .npy file of numbers") from None
    if vector.ndim > 2 or (vector.ndim == 2 and len(vector) != 1) or vector.dtype.kind != "f":
        raise UserError(f"--vector: {path} holds {vector.dtype} {vector.shape}, not one vector of floats")
    return vector.reshape(1, -1)


def _patient(args: argparse.Namespace, store: Any) -> str | None:
    if not args.other_patients:
        if args.not_patient is None:
            return None
        from medclip_lab.retrieval.filters import Condition

        if not len(store.ids((Condition("patient_id", "=", (args.not_patient,)),))):
            print("--not-patient excludes nobody: no row is of this patient", file=sys.stderr)
        return str(args.not_patient)
    if args.id is None or args.not_patient is not None:
        raise UserError("--other-patients is for --id, and --not-patient for other queries")
    patient = store.rows([args.id])[0]["patient_id"]
    if patient is None:
        raise UserError(f"--other-patients: row {args.id} has no patient_id")
    return str(patient)


def add_rag(verbs: Verbs) -> None:
    group = verbs.add_parser("rag", help="reports for a generator: how many at which risk, written out, by domain")
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True)
    parser = add_verb(
        actions,
        "calibrate",
        "how many reports may be kept at a stated risk",
        "rag calibrate index embeddings/val --risk contradiction --alpha 0.1 --out calibration.json",
        _run_calibrate,
    )
    _add_asking(parser, "held-out studies with labels; their images ask")
    parser.add_argument(
        "--risk",
        choices=("contradiction", "contradictions", "miss"),
        default="contradiction",
        help="any kept report contradicts the study's labels; how many of k do; none supports them",
    )
    parser.add_argument("--alpha", type=float, default=0.1, help="what the risk stays under (default: 0.1)")
    parser.add_argument(
        "--signal",
        choices=("chance", "score", "ratio", "rank"),
        default="chance",
        help="what is cut at: the risk so far as a model foretells it, the cosine, its share of the best, or one place "
        "for all (default: chance)",
    )
    parser = add_verb(
        actions,
        "export",
        "answers in MMed-RAG's layout, a line of JSON for each study, and what they are worth",
        "rag export index embeddings/test --policy calibrated --calibration calibration.json --out references.jsonl",
        _run_export,
    )
    _add_asking(parser, "the studies that ask, by their images")
    _add_policy(parser)
    parser = add_verb(
        actions,
        "route",
        "one index a domain: queries go to the domain whose mean image is nearest",
        "rag route --domain chest=index-chest,embeddings-chest --domain eye=index-eye,embeddings-eye --out router.json",
        _run_route,
    )
    parser.add_argument("--domain", action="append", required=True, metavar="NAME=INDEX,EMBEDDINGS")
    parser.add_argument("--out", type=Path, required=True)


def _add_asking(parser: argparse.ArgumentParser, who: str) -> None:
    parser.add_argument("index", help="a folder, or a collection of Milvus")
    parser.add_argument("embeddings", type=Path, nargs="+", help=who)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-k", type=int, default=10, help="reports that are looked at (default: 10)")
    parser.add_argument("--labels", default=None, help="findings that are compared, as Edema,Pneumonia (default: all)")
    parser.add_argument("--same-patient", action="store_true", help="let the query's own patient be an answer")
    _add_where(parser)
    add_store(parser)


def _asking(args: argparse.Namespace) -> Any:
    from medclip_lab.retrieval.rag import Ask

    labels = None if args.labels is None else tuple(name.strip() for name in args.labels.split(",") if name.strip())
    return Ask(k=args.k, where=tuple(args.where), labels=labels, other_patients=not args.same_patient)


def _run_calibrate(args: argparse.Namespace) -> None:
    from medclip_lab.retrieval.rag import calibrate_index

    made = calibrate_index(_open(args), args.embeddings, _asking(args), args.risk, args.alpha, args.signal, args.out)
    measured = made["measured"]
    say(
        args,
        made,
        f"{args.out}: {made['risk']} under {made['alpha']:g} by {made['queries']} patients; on them "
        f"{measured['risk']:.3f}, with {measured['kept']:.1f} of {made['k']} reports kept",
    )


def _run_export(args: argparse.Namespace) -> None:
    from medclip_lab.retrieval.rag import export

    store, asking = _open(args), _asking(args)
    asked = {"modality": asking.modality, "labels": asking.labels, "other_patients": asking.other_patients}
    found = export(store, args.embeddings, asking, _policy(args, store, asked), args.out)
    told = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name != "queries")
    say(args, found, f"{args.out}: {found['queries']} queries; {told}")


def _run_route(args: argparse.Namespace) -> None:
    from medclip_lab.retrieval.router import Domain, build_router

    domains = {}
    for given in args.domain:
        name, _, paths = given.partition("=")
        index, _, embeddings = paths.partition(",")
        if not (name and index and embeddings) or name in domains:
            raise UserError(f"--domain: write NAME=INDEX,EMBEDDINGS, each name once, got {given!r}")
        domains[name] = Domain(Path(index), Path(embeddings))
    made = build_router(domains, args.out)
    right = ", ".join(f"{name} {share:.3f}" for name, share in made["accuracy"].items())
    say(
        args,
        {"domains": list(domains), "accuracy": made["accuracy"]},
        f"{args.out}: held-out images by domain: {right}",
    )
