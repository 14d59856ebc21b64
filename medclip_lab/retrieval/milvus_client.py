"""Talking to Milvus: who answers, what it refuses, and values as it writes them."""

import json
import logging
import os
from typing import Any

from medclip_lab.errors import UserError
from medclip_lab.retrieval.filters import FilterError


class AwayError(UserError):
    """Milvus does not answer, or refuses what is no mistake of who asks."""


def quoted(text: str) -> str:
    """A string of Milvus's language; whatever stands in the text stays in it.

    Raises:
        UserError: a control character that Milvus has no way to write.
    """
    if any(ord(character) < 32 and character not in "\n\r\t" for character in text):
        told = "a value holds control characters, which Milvus does not take"
        raise FilterError(told, told)
    return json.dumps(text, ensure_ascii=False)


def import_pymilvus() -> Any:
    """The pymilvus module, told not to log: its lines hold the filters, and those hold patients.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pymilvus
    except ImportError:
        raise UserError("pymilvus is not installed: pip install 'medclip_lab[milvus]'") from None
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return pymilvus


def connect(uri: str) -> Any:
    """A client of a server or of a file; a server's token is taken from MILVUS_TOKEN.

    Raises:
        UserError: nobody answers.
    """
    pymilvus = import_pymilvus()
    try:
        return pymilvus.MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=30)
    except pymilvus.MilvusException as error:
        raise AwayError(f"index: Milvus does not answer at {uri}: {_first_line(error)}") from None


def ask(function: Any, *arguments: Any, **options: Any) -> Any:
    """
    Raises:
        UserError: Milvus refuses.
    """
    pymilvus = import_pymilvus()
    try:
        return function(*arguments, **options)
    except pymilvus.MilvusException as error:
        raise AwayError(f"index: Milvus refuses {function.__name__}: {_first_line(error)}") from None


def _first_line(error: Any) -> str:
    return (str(getattr(error, "message", "")).splitlines() or ["no reason given"])[0][:200]
