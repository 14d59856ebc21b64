"""A run that begins where another one was: a long run at constant rate is cooled down from any of its checkpoints.

A schedule that does not depend on the length of a run before its decay ("wsd", "rsqrt") makes the first steps of a
short run and of a long one the same steps. So a branch is no new kind of run: it is the run that its config describes,
and only takes its first steps from the other folder.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from medclip_lab.errors import UserError
from medclip_lab.files import read_json
from medclip_lab.training.rules import treatments
from medclip_lab.training.schedule import shared_steps

if TYPE_CHECKING:
    from medclip_lab.training.run import RunConfig

OPEN = {
    "": {"out", "branch_from", "optim", "trainer", "checkpoint", "survival", "ranks"},
    "optim": {"rules", "schedule", "warmup", "decay", "final_lr", "lr", "weight_decay"},  # compared as what they do
    "trainer": {
        *("steps", "samples", "epochs", "val_every", "val_minutes", "log_every"),
        *("accelerator", "devices", "compile", "tensorboard", "wandb", "mlflow"),
    },
}
"""Settings in which a branch may differ from its origin, by section."""


def refuse_other_origin(
    config: "RunConfig",
    origin: "RunConfig",
    facts: dict[str, Any],
    folder: Path,
    start: int,
    model: nn.Module,
    loss: nn.Module,
) -> None:
    """Stop before a run takes steps from one that made other steps.

    Args:
        config, origin: of the branch and of the run it begins with.
        facts: "steps" and "shards" of the branch, as `run.json` has them.
        folder: of the origin.
        start: the step whose checkpoint it goes on from.
        model, loss: of the branch, before its rules have frozen anything.

    Raises:
        UserError: another setting, other data, or other rates up to the checkpoint.
    """
    for section, free in OPEN.items():
        mine, theirs = (getattr(c, section) if section else c for c in (config, origin))
        for field in dataclasses.fields(mine):
            if field.name not in free and getattr(mine, field.name) != getattr(theirs, field.name):
                name = f"{section}.{field.name}" if section else field.name
                raise UserError(
                    f"branch_from: {folder} has another {name}: a branch may differ in its length, its decay and what "
                    "it shows"
                )
    recorded = read_json(folder / "run.json", "run")
    if recorded["shards"] != facts["shards"]:
        raise UserError(f"branch_from: {folder} was trained on other shards")
    before = treatments(model, origin.optim, recorded["steps"], loss)
    for name, now in treatments(model, config.optim, facts["steps"], loss).items():
        then = before[name]
        if now is None or then is None:
            same = start + 1 if now is then else 0
        elif (now.lr, now.weight_decay) != (then.lr, then.weight_decay):
            same = 0
        else:
            same = shared_steps(now.schedule, then.schedule)
        # The rate of the step after the checkpoint is in it.
        if same <= start:
            raise UserError(
                f"branch_from: {folder} is at step {start}, and the rate of {name} is another from step {same} on: "
                "only 'wsd', 'rsqrt' and 'constant' with a warmup given in steps go on with another length, and their "
                f"decay must not begin before step {start}"
            )
