"""Tokens of an identity provider (OpenID Connect): signed JWTs (RFC 7519) whose claims say who asks and for what.

Only what RFC 8725 leaves: asymmetric signatures by an allow-list, never "none" or HMAC; issuer, audience, expiry and
subject must be right. Keys come from a file, or from the issuer, the one address that is fetched.
"""

import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from medclip_lab.errors import UserError
from medclip_lab.serving.dicomweb import NoRedirect
from medclip_lab.serving.keys import Caller
from medclip_lab.serving.logs import LOGGER
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.settings import LOOPBACK, SCOPES, Scope

ALGORITHMS = [family + bits for family in ("RS", "PS", "ES") for bits in ("256", "384", "512")]
PREFIX = "medclip:"
"""A scope may be called `classify` or `medclip:classify`."""
LEEWAY = 60
"""Seconds that two clocks may differ."""
FRESH, STALE = 3600.0, 86400.0
"""Seconds after which keys are asked for again, and after which they are no longer believed if nobody answers."""
PAUSE, FIRST_PAUSE = 60.0, 5.0
"""Seconds between two attempts at keys: an unknown key id asks for none sooner; before there are any keys."""
PUBLIC = ("kty", "n", "e", "crv", "x", "y", "kid", "alg")
"""Members of a key that are read."""
TIMEOUT, MOST_BYTES, LEAST_RSA_BITS = 5.0, 2**20, 2048


class KeySource:
    """Where the public keys come from: a file, or what the issuer's discovery document names.

    Raises:
        UserError: an issuer that is no https address, or a file that holds no keys.
    """

    def __init__(self, issuer: str, file: Path | None) -> None:
        parts = urlsplit(issuer)
        plain = parts.scheme == "http" and parts.hostname in LOOPBACK
        if not (parts.scheme == "https" or plain) or not parts.hostname or re.search(r"[?#@\s]", issuer):
            raise UserError(f"--oidc-issuer: {issuer!r} is not of the form https://host/path")
        self.issuer, self._file = issuer, file
        # No proxy and no redirect: what the operator named is asked, and nothing else.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect())
        if file is not None:
            try:
                self.read()
            except OSError as error:
                raise UserError(f"--oidc-jwks: cannot read {file}: {error.strerror}") from None
            except ValueError as error:
                raise UserError(f"--oidc-jwks: {file}: {error}") from None

    def read(self) -> dict[str, Any]:
        """Public keys by their ids; waits for the issuer, so not on the event loop.

        Raises:
            OSError: it does not answer.
            ValueError: it answers something else.
        """
        if self._file is not None:
            return public_keys(json.loads(self._file.read_bytes()))
        found = self._get(self.issuer.rstrip("/") + "/.well-known/openid-configuration")
        place = found.get("jwks_uri")
        if found.get("issuer") != self.issuer:
            raise ValueError("the discovery document is of another issuer")
        if not isinstance(place, str) or urlsplit(place)[:2] != urlsplit(self.issuer)[:2]:
            raise ValueError("jwks_uri is not at the issuer: save the keys and name the file by --oidc-jwks")
        return public_keys(self._get(place))

    def _get(self, url: str) -> dict[str, Any]:
        request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310 - checked above
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                data = answer.read(MOST_BYTES + 1)
        except (urllib.error.URLError, HTTPException) as error:
            raise OSError(f"no answer ({type(error).__name__})") from None
        if len(data) > MOST_BYTES:
            raise ValueError("more than a megabyte")
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value


def public_keys(value: Any) -> dict[str, Any]:
    """RSA and EC keys of a JSON Web Key Set (RFC 7517) by their ids; others, and short ones, are left out.

    Raises:
        ValueError: no key set, or no key in it that serves.
    """
    from joserfc import jwk
    from joserfc.errors import JoseError

    entries = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise ValueError("no JSON Web Key Set")
    found: dict[str, Any] = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC") or entry.get("use", "sig") != "sig":
            continue
        public = {name: part for name, part in entry.items() if name in PUBLIC}
        try:
            key = jwk.import_key(cast(Any, public))
            bits = cast(Any, key).raw_value.key_size
        except (JoseError, ValueError, TypeError, KeyError):
            continue
        if entry["kty"] == "EC" or bits >= LEAST_RSA_BITS:
            found[str(entry.get("kid") or "")] = key
    if not found:
        raise ValueError("no RSA or EC key that serves")
    return found


class Tokens:
    """Who a token stands for.

    Args:
        audience: this service's own name at the issuer.
        claim: which holds the scopes, as words or a list.

    Raises:
        UserError: see `KeySource`, or joserfc is not installed.
    """

    def __init__(self, issuer: str, audience: str, file: Path | None, claim: str) -> None:
        try:
            from joserfc.jwt import JWTClaimsRegistry
        except ImportError:
            raise UserError("--oidc-issuer: joserfc is not installed: pip install 'medclip_lab[oidc]'") from None
        self._source = KeySource(issuer, file)
        self._claim = claim
        self._keys: dict[str, Any] = {}
        self._read_at = self._tried_at = float("-inf")
        self._lock = asyncio.Lock()
        self._rules = JWTClaimsRegistry(
            leeway=LEEWAY,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
            sub={"essential": True},
        )

    async def caller(self, token: str) -> Caller:
        """Whose token it is, and what it opens.

        Raises:
            Problem: 401 for a token that is wrong, 403 for one without a scope of this service, 503 without keys.
        """
        from joserfc import errors, jws, jwt

        try:
            header = jws.extract_compact(token.encode()).headers()
            if header.get("alg") not in ALGORITHMS:
                raise errors.UnsupportedAlgorithmError
            key = await self._key(str(header.get("kid") or ""))
            claims = jwt.decode(token, key, algorithms=ALGORITHMS).claims
            self._rules.validate(claims)
        except errors.ExpiredTokenError:
            raise refused("has expired: ask for a new one") from None
        except errors.ClaimError as error:
            raise refused(f"has a wrong or missing claim `{claim_of(error)}`") from None
        except errors.UnsupportedAlgorithmError:
            raise refused(f"is not signed by one of {', '.join(ALGORITHMS)}") from None
        except errors.BadSignatureError:
            raise refused("has a wrong signature") from None
        except (errors.JoseError, ValueError, TypeError, RecursionError):
            raise refused("cannot be read") from None
        scopes = scopes_of(claims.get(self._claim))
        if not scopes:
            told = ", ".join(SCOPES)
            raise Problem(403, "scope", f"the token's claim for scopes has none of {told}: ask its issuer for one")
        return Caller("oidc", scopes, subject=str(claims["sub"])[:256])

    async def _key(self, identifier: str) -> Any:
        """The key of an id; keys that are old, or lack it, are read anew, at most once a minute."""
        # A known key waits for nobody who asks already: an issuer that hangs would hold up every request.
        needed = identifier not in self._keys or self._age() > STALE
        if needed or (self._age() > FRESH and not self._lock.locked()):
            async with self._lock:
                pause = PAUSE if self._keys else FIRST_PAUSE
                outdated = identifier not in self._keys or self._age() > FRESH
                if outdated and time.monotonic() - self._tried_at >= pause:
                    await self._read()
        if not self._keys or self._age() > STALE:
            wait = str(int(FIRST_PAUSE))
            raise Problem(503, "issuer", "the issuer's keys cannot be had: try again", {"Retry-After": wait})
        if identifier not in self._keys:
            raise refused("is signed by a key that its issuer does not name")
        return self._keys[identifier]

    async def _read(self) -> None:
        self._tried_at = time.monotonic()
        try:
            self._keys = await asyncio.to_thread(self._source.read)
            self._read_at = time.monotonic()
        except (OSError, ValueError, RecursionError) as error:
            LOGGER.error("issuer's keys were not read", exc_info=error)

    def _age(self) -> float:
        return time.monotonic() - self._read_at


def scopes_of(value: Any) -> frozenset[Scope]:
    """This service's scopes among the words of a claim."""
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
    named = {word.removeprefix(PREFIX) for word in words if isinstance(word, str)}
    return frozenset(scope for scope in SCOPES if scope in named)


def claim_of(error: Any) -> str:
    """The name of a claim; those are ours, not the token's."""
    name = str(getattr(error, "claim", ""))
    return name if re.fullmatch(r"[a-z]{3}", name) else "unknown"


def refused(why: str) -> Problem:
    """401, in the form of RFC 6750."""
    header = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return Problem(401, "token", f"the token {why}", header)
