"""How deep in its tower a parameter lies, for rates that fall towards the input."""

import re

from torch import nn

BLOCK = re.compile(r"(?:^|\.)(?:(?:resblocks|blocks?|layers?|h)\.|layer(?=\d))(\d+)\.")
STEM = re.compile(r"(?:^|\.)(?:\w*emb\w*|\w*stem\w*|\w*patch\w*|conv\d|bn\d|ln_pre|cls_token|wte|wpe)(?:\.|$)")


def layers_above(model: nn.Module) -> dict[str, int]:
    """Name of each parameter of a tower -> layers between it and the tower's output, 0 for a head.

    Layers are those of timm's `group_matcher` where a tower has one, else the numbers in the names, with everything
    called an embedding or a stem below the first block. A tower without layers is not in the answer, nor are scale and
    bias.
    """
    names = [name for name, _ in model.named_parameters() if not name.startswith("logit_")]
    grouped = _by_matchers(model)
    above = {}
    for image in (True, False):
        tower = [name for name in names if name.startswith("visual.") == image]
        numbered = {name: int(found[1]) for name in tower if (found := BLOCK.search(name)) and name not in grouped}
        first = min(numbered.values(), default=0)
        depth = {name: number - first + 1 for name, number in numbered.items()}
        depth |= {name: grouped[name] for name in tower if name in grouped}
        if not depth:
            continue
        top = max(depth.values()) + 1
        for name in tower:
            above[name] = top - depth.get(name, 0 if STEM.search(name) else top)
    return above


def _by_matchers(model: nn.Module) -> dict[str, int]:
    """Parameters of timm's models by the groups they name themselves."""
    from timm.models import group_parameters

    found: dict[str, int] = {}
    for prefix, module in model.named_modules():
        if callable(getattr(module, "group_matcher", None)):
            groups = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
            for name, number in groups.items():
                found.setdefault(f"{prefix}.{name}" if prefix else name, number)  # the outermost one counts
    return found
