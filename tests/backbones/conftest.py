"""What tests of several backbones share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sam_gym.backbones import Backbone, Prompts


@pytest.fixture(scope="session")
def assert_masks_of() -> Callable[[Any, Backbone, str, bool], None]:
    """Asserts that a backbone gives the masks, scores and object scores of transformers' model."""

    def check(model: Any, backbone: Backbone, prompt: str, multimask: bool) -> None:
        image = np.random.default_rng(0).integers(0, 256, (60, 200, 3), dtype=np.uint8)
        theirs: dict[str, Any] = {}
        ours: dict[str, Any] = {}
        if "points" in prompt:
            points, labels = torch.tensor([[[9.0, 20.0], [90.0, 110.0]]]), torch.tensor([[1, 0]])
            theirs |= {"input_points": points[None], "input_labels": labels[None]}
            ours |= {"points": points, "labels": labels}
        if "box" in prompt:
            box = torch.tensor([[3.0, 5.0, 22.0, 30.0]])
            theirs, ours = theirs | {"input_boxes": box[None]}, ours | {"boxes": box}
        if "mask" in prompt:
            mask = torch.randn(1, *backbone.mask_shape, generator=torch.Generator().manual_seed(1))
            theirs, ours = theirs | {"input_masks": mask[None]}, ours | {"masks": mask}
        with torch.no_grad():
            pixels = backbone.prepare([image])
            expected = model(pixel_values=pixels, multimask_output=multimask, **theirs)
        features = backbone.encode([image])
        logits, iou = backbone.decode(features, Prompts(**ours), multimask=multimask)
        masks, scores = expected.pred_masks[0, 0], expected.iou_scores[0, 0]
        assert (logits[0] - masks).abs().max() <= 1e-4 * masks.std()
        torch.testing.assert_close(iou[0], scores, atol=1e-4, rtol=0)
        score = backbone.decode_tokens(features, Prompts(**ours)).object_score
        torch.testing.assert_close(score, expected.object_score_logits[0, 0], atol=1e-4, rtol=0)

    return check
