"""The objectives. Each is a plain `nn.Module` that is called as open_clip calls its own losses."""

if __name__ != "medclip_lab.losses":
    raise ImportError("import medclip_lab.losses, not losses")

from medclip_lab.losses.clip import ClipLoss
from medclip_lab.losses.distill import DistillLoss
from medclip_lab.losses.multi_positive import MultiPositiveClipLoss
from medclip_lab.losses.multi_view import MultiViewClipLoss
from medclip_lab.losses.prototype import PrototypeLoss
from medclip_lab.losses.registry import LossConfig, build_loss
from medclip_lab.losses.siglip import SigLipLoss
from medclip_lab.losses.soft_target import SoftTargetClipLoss
from medclip_lab.losses.weighted_sum import WeightedSum

__all__ = [
    "ClipLoss",
    "DistillLoss",
    "LossConfig",
    "MultiPositiveClipLoss",
    "MultiViewClipLoss",
    "PrototypeLoss",
    "SigLipLoss",
    "SoftTargetClipLoss",
    "WeightedSum",
    "build_loss",
]
