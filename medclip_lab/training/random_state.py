"""The random numbers of a process, as tensors that a checkpoint can hold."""

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from medclip_lab.data.order import random_state as named_state


def random_state() -> dict[str, Tensor]:
    """Where the generators of Python, NumPy, torch and this process's GPU stand."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    told = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }
    state = {"words": torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: Mapping[str, Tensor]) -> None:
    """Go on with the numbers that would have come after `random_state`."""
    told = json.loads(bytes(state["words"].tolist()))
    version, words, gauss = told["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = told["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_random(*words: object) -> None:
    """Fresh numbers for anything that can be named, such as a rank that the checkpoint knows nothing of."""
    drawn = named_state("rank", *words)
    random.seed(int(drawn.randint(2**31)))
    np.random.seed(int(drawn.randint(2**31)))
    torch.manual_seed(int(drawn.randint(2**31)))  # of GPUs too
