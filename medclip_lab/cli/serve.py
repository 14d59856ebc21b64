"""The verb of the service, and of its keys."""

import argparse
import os
from pathlib import Path

from medclip_lab.cli.common import Verbs, add_verb, say
from medclip_lab.errors import UserError

MIB = 2**20


def add_serve(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "serve",
        "findings, similar cases and embeddings over HTTP, and a page to look at them",
        "serve bundle --index index-images --keys keys.json --host 0.0.0.0",
        _run_serve,
    )
    parser.add_argument("bundle", type=Path, nargs="?", help="folder of an exported bundle")
    parser.add_argument(
        "--index", type=Path, nargs="+", default=[], help="folders of indexes built with the bundle, or routers' files"
    )
    parser.add_argument("--collection", nargs="+", default=[], help="indexes that Milvus holds, at --uri")
    parser.add_argument("--uri", default=None, help="of Milvus: a file, or http://host:19530")
    parser.add_argument(
        "--calibration", type=Path, nargs="+", default=[], help="what rag calibrate wrote for these indexes"
    )
    parser.add_argument(
        "--thumbnails",
        nargs="+",
        default=[],
        metavar="INDEX=FOLDER",
        help="shards or images of an index, for small pictures of its cases; asking needs the scope thumbnails",
    )
    parser.add_argument(
        "--labelset", default=None, help="what is meant where a request names none (default: the first)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="any other address needs --keys or --oidc-issuer")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with its own model (default: 1)")
    access = parser.add_argument_group("access")
    access.add_argument("--keys", type=Path, default=None, help="file of API keys (default: only this machine may ask)")
    access.add_argument(
        "--new-key",
        nargs="+",
        metavar="SCOPE",
        default=None,
        help="add a key with these scopes (classify, search, text, thumbnails) to --keys, print it, and stop",
    )
    access.add_argument(
        "--local-scopes", nargs="+", default=["classify", "search"], help="without --keys (default: classify search)"
    )
    access.add_argument("--oidc-issuer", default=None, metavar="URL", help="an identity provider whose tokens open")
    access.add_argument("--oidc-audience", default=None, metavar="NAME", help="what the service is called there")
    access.add_argument(
        "--oidc-jwks", type=Path, default=None, metavar="FILE", help="the provider's public keys (default: it is asked)"
    )
    access.add_argument(
        "--oidc-scope-claim", default="scope", metavar="CLAIM", help="of a token, with its scopes (default: scope)"
    )
    access.add_argument("--audit", type=Path, default=None, help="file that gets a line for every request")
    access.add_argument(
        "--dicomweb", nargs="+", default=[], metavar="NAME=URL", help="archives to pull instances from (default: none)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-body-mib", type=int, default=64, help="of a request (default: 64)")
    limits.add_argument("--max-pixels", type=int, default=40_000_000, help="of an image (default: 40,000,000)")
    limits.add_argument("--max-images", type=int, default=16, help="of a request (default: 16)")
    limits.add_argument("--max-waiting", type=int, default=64, help="requests at once; others get 429 (default: 64)")
    limits.add_argument("--deadline", type=float, default=30.0, help="seconds for a request (default: 30)")
    model = parser.add_argument_group("model")
    model.add_argument("--max-batch", type=int, default=16, help="inputs through a tower at once (default: 16)")
    model.add_argument("--max-delay-ms", type=float, default=4.0, help="a batch waits for others (default: 4)")
    model.add_argument(
        "--decode-threads", type=int, default=None, help="(default: one a core, and fewer while the model computes)"
    )
    model.add_argument("--device", default="auto")
    model.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    model.add_argument("--compile", action="store_true", help="compile the image tower: slow to start")
    model.add_argument(
        "--onnx", type=Path, default=None, help="folder of `export --to onnx`: ONNX Runtime runs the towers, on the CPU"
    )


def _run_serve(args: argparse.Namespace) -> None:
    # Read by GNU's OpenMP when torch comes in: threads that wait for each other spin for a moment, and not for
    # milliseconds in which whoever decodes the next image has no core.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        from medclip_lab.serving import keys, run, settings
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'medclip_lab[serve]'") from None
    if args.new_key is not None:
        if args.keys is None:
            raise UserError("--new-key goes into a file: name it by --keys")
        key = keys.new_key(args.keys, args.new_key)
        say(args, {"key": key, "scopes": args.new_key, "file": str(args.keys)}, key)
        return
    if args.bundle is None:
        raise UserError("bundle is missing: name the folder of an exported bundle")
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}")
    run.run(
        settings.Settings(
            bundle=args.bundle,
            indexes=tuple(args.index),
            collections=tuple(args.collection),
            uri=args.uri,
            calibrations=tuple(args.calibration),
            thumbnails=tuple(args.thumbnails),
            labelset=args.labelset,
            host=args.host,
            port=args.port,
            keys=args.keys,
            local_scopes=tuple(args.local_scopes),
            max_body=args.max_body_mib * MIB,
            max_pixels=args.max_pixels,
            max_images=args.max_images,
            max_waiting=args.max_waiting,
            deadline=args.deadline,
            max_batch=args.max_batch,
            max_delay=args.max_delay_ms / 1000,
            decode_threads=args.decode_threads,
            device=args.device,
            precision=args.precision,
            compile=args.compile,
            onnx=args.onnx,
            oidc_issuer=args.oidc_issuer,
            oidc_audience=args.oidc_audience,
            oidc_jwks=args.oidc_jwks,
            oidc_scope_claim=args.oidc_scope_claim,
            audit=args.audit,
            dicomweb=tuple(args.dicomweb),
        ),
        args.workers,
    )
