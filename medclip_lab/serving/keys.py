"""API keys: random, hashed at rest, compared in constant time, each with the scopes it opens.

A key is 256 random bits, so there is nothing to guess and a slow hash (scrypt, argon2) would protect nothing: those
make up for passwords that people choose. A salted HMAC-SHA256 costs microseconds, which every request pays.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, read_json, write_json
from medclip_lab.serving.settings import SCOPES, Scope

FORMAT = "medclip-lab-keys/1"
SHAPES = {"id": "[0-9a-f]{8}", "salt": "[0-9a-f]{32}", "hash": "[0-9a-f]{64}"}
"""Of what an entry of a file has, beside its scopes."""
SHAPE = re.compile(r"mcl_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    id: str
    """Of the key, for logs; "oidc" for a token; "local" where nobody is asked; "none" for who has neither."""
    scopes: frozenset[Scope]
    subject: str | None = None
    """Whom a token stands for, by its issuer's id; for the audit alone."""


class Keys:
    """The keys of a file."""

    def __init__(self, path: Path) -> None:
        self._entries = {entry["id"]: entry for entry in _read(path)}

    def caller(self, key: str | None) -> Caller | None:
        """Whose key it is; None for a wrong one. A wrong id takes as long as a wrong secret."""
        match = SHAPE.fullmatch(key or "")
        identifier, secret = match.groups() if match else ("", "")
        entry = self._entries.get(identifier)
        found = hash_of(secret, entry["salt"] if entry else "00" * 16)
        right = hmac.compare_digest(found, entry["hash"] if entry else "f" * 64)
        return Caller(identifier, frozenset(entry["scopes"])) if right and entry else None


def hash_of(secret: str, salt: str) -> str:
    """HMAC-SHA256 of a secret under a salt, both as text."""
    return hmac.new(bytes.fromhex(salt), secret.encode(), hashlib.sha256).hexdigest()


def new_key(path: Path, scopes: Sequence[str]) -> str:
    """Add a key to a file, made if need be and readable by its owner only; returns the key, which is kept nowhere.

    Raises:
        UserError: no scope, an unknown one, or a file of something else.
    """
    if not scopes or any(scope not in SCOPES for scope in scopes):
        raise UserError(f"serve: a key needs scopes out of {', '.join(SCOPES)}; got {', '.join(scopes) or 'none'}")
    entries = _read(path) if path.exists() else []
    identifier, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_hex(16)
    entry = {"id": identifier, "scopes": sorted(set(scopes)), "salt": salt, "hash": hash_of(secret, salt)}
    entries.append(entry)
    with atomic_file(path) as temporary:
        temporary.touch(mode=0o600)
        write_json(temporary, {"format": FORMAT, "keys": entries})
        os.chmod(temporary, 0o600)  # noqa: PTH101
    return f"mcl_{identifier}_{secret}"


def _read(path: Path) -> list[dict[str, Any]]:
    record = read_json(path, "keys")
    entries = record.get("keys")
    if record.get("format") != FORMAT or not isinstance(entries, list):
        raise UserError(f"keys: {path} is no file of keys: make one with `medclip-lab serve --new-key classify`")
    for entry in entries:
        whole = isinstance(entry, dict) and set(entry) == SHAPES.keys() | {"scopes"}
        whole = whole and all(re.fullmatch(shape, str(entry[name])) for name, shape in SHAPES.items())
        if not whole or not isinstance(entry["scopes"], list) or any(one not in SCOPES for one in entry["scopes"]):
            raise UserError(f"keys: an entry of {path} is broken: make the key again")
    return entries
