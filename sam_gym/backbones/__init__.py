"""SAM as one shared, batched service.

`load_backbone("micro")` works offline; the real SAMs take the checkpoint their authors publish.
"""

from sam_gym.backbones.decode import NO_POINT, Prompts
from sam_gym.backbones.loading import BACKBONES, load_backbone
from sam_gym.backbones.service import Backbone

__all__ = ["BACKBONES", "NO_POINT", "Backbone", "Prompts", "load_backbone"]
