"""What a service may be told: every limit has a default that a hospital can start with."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from medclip_lab.errors import UserError

Scope = Literal["classify", "search", "text", "thumbnails"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MIB = 2**20
COUNTS = (
    *("max_body", "max_pixels", "max_aspect", "max_images", "max_labels", "max_prompts", "max_k"),
    *("max_waiting", "max_waiting_bytes", "max_batch", "cached_prompts"),
)


@dataclass(frozen=True)
class Settings:
    """A service of one bundle and any number of its indexes."""

    bundle: Path
    """Folder of an exported bundle."""
    indexes: tuple[Path, ...] = ()
    """Folders of indexes built with it, or files of routers; each goes by the name of its folder or file."""
    collections: tuple[str, ...] = ()
    """Further indexes, collections of Milvus at `uri`."""
    uri: str | None = None
    """Of Milvus: a file, or http://host:19530."""
    calibrations: tuple[Path, ...] = ()
    """What `rag calibrate` wrote, each for that of the indexes it was made with."""
    thumbnails: tuple[str, ...] = ()
    """Where the images of an index lie, as INDEX=FOLDER or ROUTER/DOMAIN=FOLDER, of shards or of images."""
    labelset: str | None = None
    """The label set that is meant where a request names none; None takes the bundle's first."""
    host: str = "127.0.0.1"
    """Address to listen at; anything but this machine's own needs `keys`."""
    port: int = 8000
    keys: Path | None = None
    """File of API keys. Without one only this machine may ask, under `local_scopes`."""
    local_scopes: tuple[Scope, ...] = ("classify", "search")
    """What may be asked without a key where there is no file of keys."""
    oidc_issuer: str | None = None
    """Whose tokens are believed, as https://host/path; beside keys or in their place."""
    oidc_audience: str | None = None
    """This service's name at the issuer."""
    oidc_jwks: Path | None = None
    """File of the issuer's public keys; None asks the issuer for them."""
    oidc_scope_claim: str = "scope"
    """Claim of a token that holds its scopes."""
    max_body: int = 64 * MIB
    """Bytes of one request."""
    max_pixels: int = 40_000_000
    """Rows x columns x samples x frames of one image, by its header."""
    max_aspect: float = 20.0
    """The longer side of an image over the shorter one."""
    max_images: int = 16
    """Images of one request."""
    max_labels: int = 64
    """Labels of one request, if they are its own."""
    max_prompts: int = 16
    """Prompts for a label, and as many against it."""
    max_k: int = 1000
    """Answers of one search."""
    max_waiting: int = 64
    """Requests that are in the house at once; more are told to come again."""
    max_waiting_bytes: int = 512 * MIB
    """Bytes of the bodies of those."""
    deadline: float = 30.0
    """Seconds a request may take from its first byte to its answer."""
    max_batch: int = 16
    """Images or texts that go through a tower at once."""
    max_delay: float = 0.004
    """Seconds the first of a batch waits for others that are being decoded; alone, it does not wait."""
    decode_threads: int | None = None
    """Images decoded at once; None takes one a core, and fewer while the CPU computes for others."""
    cached_prompts: int = 4096
    """Embeddings of prompts kept for labels that come again."""
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the towers; bfloat16 is autocast."""
    compile: bool = False
    """Compile the image tower with torch.compile: a slow start, for a tower that is served for long."""
    onnx: Path | None = None
    """Folder of the bundle's towers as ONNX, float32 or int8, which ONNX Runtime then runs on the CPU."""
    audit: Path | None = None
    """File to which a line for every answered request is added: who, what, when; never the content."""
    dicomweb: tuple[str, ...] = ()
    """Archives to pull instances from, as NAME=https://host/path; nothing else is ever fetched."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UserError(f"serve: {name} must be at least 1, got {getattr(self, name)}")
        if self.max_delay < 0:
            raise UserError(f"serve: max_delay must be at least 0 seconds, got {self.max_delay}")
        if self.deadline <= 0:
            raise UserError(f"serve: the deadline must be above 0 seconds, got {self.deadline}")
        if self.decode_threads is not None and self.decode_threads < 1:
            raise UserError(f"serve: decode_threads must be at least 1, got {self.decode_threads}")
        if unknown := [scope for scope in self.local_scopes if scope not in SCOPES]:
            raise UserError(f"serve: no scope is called {unknown[0]!r} (there are {', '.join(SCOPES)})")
        if self.onnx is not None and (self.compile or self.precision != "float32"):
            raise UserError("serve: --onnx brings its own precision: leave --precision and --compile out")
        if bool(self.collections) != (self.uri is not None):
            raise UserError("serve: collections of Milvus and its uri go together")
        for given in self.thumbnails:
            if "=" not in given.strip("="):
                raise UserError(f"serve: thumbnails are INDEX=FOLDER, got {given!r}")
        if self.oidc_issuer is not None and not self.oidc_audience:
            raise UserError("serve: --oidc-issuer needs --oidc-audience, or tokens for other services open this one")
        if self.oidc_issuer is None and (self.oidc_audience or self.oidc_jwks):
            raise UserError("serve: --oidc-audience and --oidc-jwks belong to --oidc-issuer")
        if self.local and self.host not in LOOPBACK:
            raise UserError(
                f"serve: at {self.host} anyone could ask: make a key with `medclip-lab serve --new-key classify` "
                "and name its file by --keys, or listen at 127.0.0.1"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine is served, and without a key."""
        return self.keys is None and self.oidc_issuer is None

    @property
    def threads(self) -> int:
        """Images decoded at once, at most."""
        return self.decode_threads or os.cpu_count() or 1
