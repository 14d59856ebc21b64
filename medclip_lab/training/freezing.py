"""Parameters that do not train, or not yet: what asks for no gradient costs none."""

from collections.abc import Callable, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from medclip_lab.training.rules import Treatment
from medclip_lab.training.schedule import Schedule


class Freezing:
    """Keeps `requires_grad` of a model, and the mode of its batch norms, as its treatments ask at each step.

    The losses skip the gradient of a tower of which nothing trains. A batch norm that does not train uses the
    statistics it has: a frozen tower is one function.

    Args:
        parameters: gives them by name, also after a strategy has put others in their place.
        treated: their treatments by the same names.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Callable[[], Mapping[str, nn.Parameter]],
        treated: Mapping[str, Treatment | None],
    ) -> None:
        self._parameters = parameters
        self._norms = _norms(model)
        self._timed = {
            name: treatment.schedule
            for name, treatment in treated.items()
            if treatment is not None and (treatment.schedule.start or treatment.schedule.stop is not None)
        }
        self._trains: dict[Schedule, bool] = {}
        for name, parameter in parameters().items():
            # What trains later must ask for a gradient when the strategy sets up, or ranks would never average it.
            parameter.requires_grad_(treated[name] is not None)
        self.set_norms(model.training)

    @property
    def changes(self) -> bool:
        """Whether something is frozen for a time only."""
        return bool(self._timed)

    def at(self, step: int) -> None:
        """Freeze and unfreeze as of a step."""
        trains = {schedule: schedule.trains(step) for schedule in self._timed.values()}
        if trains == self._trains:
            return
        self._trains = trains
        parameters = self._parameters()
        for name, schedule in self._timed.items():
            if parameters[name].requires_grad != trains[schedule]:
                parameters[name].requires_grad_(trains[schedule])
                parameters[name].grad = None
        self.set_norms(True)

    def set_norms(self, training: bool) -> None:
        """Take frozen batch norms out of a model that was put in training mode."""
        for norm, owner in self._norms:
            norm.train(training and any(parameter.requires_grad for parameter in owner.parameters()))


def _norms(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Every batch norm, and the innermost module around it that has parameters: often itself."""
    modules = dict(model.named_modules())
    found: list[tuple[nn.Module, nn.Module]] = []
    for name, module in modules.items():
        if isinstance(module, _BatchNorm):
            owner: nn.Module = module
            parts = name.split(".")
            while next(owner.parameters(), None) is None and parts:
                parts.pop()
                owner = modules[".".join(parts)]
            found.append((module, owner))
    return found
