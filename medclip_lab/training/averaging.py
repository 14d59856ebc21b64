"""A moving average of the weights, which is what is validated and exported."""

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


def decay_at(decay: float, updates: int) -> float:
    """The decay of an update: it rises to `decay`, or the first weights, which know nothing, would stay for long.

    As Polyak averages are warmed up in TensorFlow's `ExponentialMovingAverage`: (1 + n) / (10 + n) after n updates.
    """
    return min(decay, (1 + updates) / (10 + updates))


class MovingAverage(WeightAveraging):
    """Exponential moving average over the steps, of weights and of floating buffers; counters are copied.

    Args:
        decay: per step, once it is warm.
    """

    def __init__(self, decay: float) -> None:
        @torch.no_grad()
        def update(average: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
            if average[0].is_floating_point():
                torch._foreach_lerp_(average, current, 1 - decay_at(decay, int(updates)))
            else:
                for mean, value in zip(average, current, strict=True):
                    mean.copy_(value)

        super().__init__(multi_avg_fn=update)
