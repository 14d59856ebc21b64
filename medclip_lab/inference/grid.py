"""Prompts by a grid: words for how much, of what kind and where, combined; all of them, or some drawn by a seed.

The method is that of GLoRIA (Huang et al., ICCV 2021), which draws a few prompts of severity x subtype x location.
"""

import hashlib
from collections.abc import Sequence
from itertools import product


def sentences(grid: Sequence[Sequence[str]]) -> list[str]:
    """Every choice of one entry of each list, joined by blanks, the first letter a capital; empty entries say nothing.

    Each sentence stands there once, in the order of the lists, the last one turning fastest.
    """
    joined = (" ".join(" ".join(words).split()) for words in product(*grid))
    return list(dict.fromkeys(text[:1].upper() + text[1:] for text in joined))


def drawn(texts: Sequence[str], draw: int, seed: int) -> list[str]:
    """`draw` of the sentences, in their order: the first by SHA-256 of "seed:sentence". 0 takes all.

    So a draw depends on the sentences and the seed alone, and a larger one holds the smaller one.

    Raises:
        ValueError: more are to be drawn than there are.
    """
    if not draw:
        return list(texts)
    if draw > len(texts):
        raise ValueError(f"its grid has {len(texts)} sentences, {draw} are to be drawn")
    ranked = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    taken = set(ranked[:draw])
    return [text for text in texts if text in taken]
