"""The batched clicking loop against one SamPredictor per object."""

import numpy as np
import pytest
from segment_anything import SamPredictor

from sam_gym.backbones import Backbone
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.metrics.masks import iou
from sam_gym.simulation.clicks import Click, error_click
from sam_gym.simulation.interactive import Session, Target, box_of, click_out, segment_boxes


def click_out_alone(
    backbone: Backbone, target: Target, num_clicks: int
) -> tuple[list[Click], list[float], np.ndarray]:
    predictor = SamPredictor(backbone.sam)
    predictor.set_image(target.image)
    mask, clicked = np.zeros(target.mask.shape, bool), np.zeros(target.mask.shape, bool)
    clicks: list[Click] = []
    ious: list[float] = []
    logits = None
    for _ in range(num_clicks):
        click = error_click(target.mask, mask, clicked, target.ignore)
        if click is not None:
            clicks.append(click)
            clicked[click.y, click.x] = True
            masks, quality, low = predictor.predict(
                np.array([[c.x, c.y] for c in clicks], float),
                np.array([c.positive for c in clicks], int),
                mask_input=logits,
                multimask_output=len(clicks) == 1,
            )
            best = int(quality.argmax())
            mask, logits = masks[best], low[best][None]
        ious.append(iou(mask, target.mask, target.ignore))
    return clicks, ious, mask


@pytest.fixture
def targets() -> list[Target]:
    """Objects of scenes, one of them on a wide image, one with pixels to ignore."""
    one, two = Scenes("val", size=128)[3], Scenes("val", size=128)[4]
    ignore = np.zeros((128, 128), bool)
    ignore[:40] = True
    return [
        Target(one.image, one.masks[0]),
        Target(one.image[:80], one.masks[np.argmax(one.masks[:, :80].sum(axis=(1, 2)))][:80]),
        Target(two.image, two.masks[0], ignore),
    ]


@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_batch_equals_one_predictor_each(
    name: str, targets: list[Target], request: pytest.FixtureRequest
) -> None:
    backbone = request.getfixturevalue(name)
    sessions = click_out(backbone, targets, num_clicks=4)
    for session, target in zip(sessions, targets, strict=True):
        clicks, ious, mask = click_out_alone(backbone, target, 4)
        assert session.clicks == clicks and len(clicks) == 4
        np.testing.assert_allclose(session.ious, ious, atol=2e-3)
        assert np.mean(session.mask == mask) > 0.999
        assert 0 < session.seconds < 10
    assert len({tuple(session.ious) for session in sessions}) == 3


def test_object_without_pixels_needs_no_click(tiny: Backbone, targets: list[Target]) -> None:
    nothing = Target(targets[0].image, np.zeros((128, 128), bool))
    empty, other = click_out(tiny, [nothing, targets[0]], num_clicks=3)
    assert empty.clicks == [] and empty.ious == [1.0] * 3 and not empty.mask.any()
    (alone,) = click_out(tiny, [targets[0]], num_clicks=3)
    assert other.clicks == alone.clicks and len(other.clicks) == 3


def test_shipped_micro_segments_unseen_objects(shipped: Backbone) -> None:
    scenes = Scenes("val")
    objects = [Target(scenes[i].image, mask) for i in range(3) for mask in scenes[i].masks]
    sessions: list[Session] = click_out(shipped, objects, num_clicks=3)
    assert np.mean([session.ious[-1] for session in sessions]) > 0.5


def test_boxes_equal_sam_predictor(backbone: Backbone) -> None:
    targets = [
        Target(s.image, mask) for s in (Scenes("val")[0], Scenes("val")[1]) for mask in s.masks
    ]
    masks = segment_boxes(backbone, targets)
    predictor = SamPredictor(backbone.sam)
    for target, mask in zip(targets, masks, strict=True):
        predictor.set_image(target.image)
        theirs, _, _ = predictor.predict(box=box_of(target.mask), multimask_output=False)
        assert iou(mask, theirs[0]) > 0.999
