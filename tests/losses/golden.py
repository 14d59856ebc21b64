"""Values of the losses on closed-form inputs.

Made with float64 on idx = arange(32).reshape(4, 8), images sin(idx + 0.5) and texts cos(0.9 idx + 0.3), rows of unit
norm. The MedCLIP values are those of its formulas with the label vectors below, logits cosine / 0.07.
"""

import torch
import torch.nn.functional as F

_INDEX = torch.arange(32, dtype=torch.float64).reshape(4, 8)
IMAGES = F.normalize(torch.sin(_INDEX + 0.5), dim=1)
TEXTS = F.normalize(torch.cos(0.9 * _INDEX + 0.3), dim=1)
IMAGE_LABELS = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [1, 1, 0, 1, 0]], dtype=torch.float64)
TEXT_LABELS = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=torch.float64)

CLIP_TAU_007 = 1.8137951440237452
SIGLIP_T10_B_MINUS_10 = 3.778136737813208
MEDCLIP_DOT_T1 = 11.999285884779882
MEDCLIP_COSINE_T1 = 11.130337655229456
MEDCLIP_COSINE_T05 = 10.437298772265523
MEDCLIP_COSINE_T01 = 10.056345565106298
MEDCLIP_FLOOR_ONE_MATCH_OF_100 = 4.595483418234872
MEDCLIP_FLOOR_ONE_MATCH_OF_1024 = 6.930498283749761
CONVIRT_TAU_01_LAMBDA_075 = 0.8672593102940469
MGCA_TAU_007 = 3.6275902880474904
UNICL_TAU_007 = 7.4426786814943995
CXRCLIP_MVS_TAU_007 = 6.137371585927232
CXRCLIP_FULL_TAU_007 = 25.136174672680998
SECOND_IMAGES = F.normalize(torch.sin(1.1 * _INDEX + 0.9), dim=1)
SECOND_TEXTS = F.normalize(torch.cos(0.8 * _INDEX + 0.6), dim=1)
