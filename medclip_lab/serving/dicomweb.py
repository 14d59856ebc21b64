"""WADO-RS: an instance from an archive that the service was told of by name. No address ever comes from a request."""

import email.parser
import email.policy
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any

from medclip_lab.errors import UserError
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.schemas import Instance

ACCEPT = 'multipart/related; type="application/dicom"; transfer-syntax=*'
SECONDS = 20.0


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Who points elsewhere is not followed: elsewhere was not allowed."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Archives:
    """The archives by name.

    Args:
        named: NAME=https://host/path, the path being what comes before /studies.
        max_bytes: of one answer.

    Raises:
        UserError: not of that form.
    """

    def __init__(self, named: Sequence[str], max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bases: dict[str, str] = {}
        # No proxy either: what the environment names is not on the list.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect())
        for entry in named:
            name, _, base = entry.partition("=")
            if not re.fullmatch(r"[\w-]+", name) or not re.fullmatch(r"https?://[^\s?#@]+", base):
                raise UserError(f"--dicomweb: {entry!r} is not of the form NAME=https://host/path")
            self._bases[name] = base.rstrip("/")

    @property
    def names(self) -> list[str]:
        return list(self._bases)

    def fetch(self, place: Instance) -> bytes:
        """The bytes of an instance; waits for the archive, so not on the event loop.

        Raises:
            Problem: 403 for an archive that is not on the list, 502 for one that does not deliver.
        """
        base = self._bases.get(place.server)
        if base is None:
            known = f"one of {', '.join(self._bases)}" if self._bases else "none: start the service with --dicomweb"
            raise Problem(403, "archive", f"this archive may not be asked; allowed is {known}")
        url = f"{base}/studies/{place.study}/series/{place.series}/instances/{place.instance}"
        request = urllib.request.Request(url, headers={"Accept": ACCEPT})  # noqa: S310 - http(s), checked above
        try:
            with self._opener.open(request, timeout=SECONDS) as answer:
                data: bytes = answer.read(self._max_bytes + 1)
                kind = str(answer.headers.get("Content-Type", ""))
                whole = len(data) > self._max_bytes or not answer.length  # what is left of the announced length
        except (urllib.error.URLError, HTTPException, OSError) as error:
            status = f" (HTTP {error.code})" if isinstance(error, urllib.error.HTTPError) else ""
            raise Problem(
                502, "archive-failed", f"the archive did not deliver the instance{status}: try again"
            ) from None
        if len(data) > self._max_bytes:
            raise Problem(413, "instance-too-large", f"an instance may have {self._max_bytes} bytes")
        if not whole:
            raise Problem(502, "archive-failed", "the archive stopped in the middle of the instance: try again")
        return first_part(data, kind)


def first_part(data: bytes, content_type: str) -> bytes:
    """The first part of a multipart/related body; a body of one part is what it is.

    Raises:
        Problem: 502, no such part.
    """
    if not content_type.lower().startswith("multipart/"):
        return data
    head = email.parser.HeaderParser(policy=email.policy.HTTP).parsestr(f"Content-Type: {content_type}\n\n")
    boundary = head.get_boundary()
    if boundary:
        # Cut by hand: a parser of mail would read the pixels as lines of text.
        mark = b"--" + boundary.encode()
        _, found, rest = data.partition(mark)
        _, blank, body = rest.partition(b"\r\n\r\n")
        part, end, _ = body.partition(b"\r\n" + mark)
        if found and blank and end:
            return part
    raise Problem(502, "archive-failed", "the archive answered with no DICOM part")
