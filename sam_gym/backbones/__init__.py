"""SAM as one shared, batched service.

`load_backbone("micro")` works offline; published SAMs are downloaded on first use.
"""

from sam_gym.backbones.features import FeatureSpec, ImageFeatures
from sam_gym.backbones.loading import load_backbone
from sam_gym.backbones.prompts import NO_POINT, Prompts
from sam_gym.backbones.protocols import BackboneService
from sam_gym.backbones.service import Backbone
from sam_gym.backbones.spec import BACKBONES, BackboneSpec, PublishedWeights, register_backbone

__all__ = [
    "BACKBONES",
    "NO_POINT",
    "Backbone",
    "BackboneService",
    "BackboneSpec",
    "FeatureSpec",
    "ImageFeatures",
    "Prompts",
    "PublishedWeights",
    "load_backbone",
    "register_backbone",
]
