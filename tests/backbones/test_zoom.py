"""Windows around masks, and what they buy."""

import numpy as np
import pytest
import torch

from sam_gym import Predictor
from sam_gym.backbones import Backbone
from sam_gym.backbones.zoom import LARGEST, MARGIN, SMALLEST, Window, low_res_logits
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.simulation.clicks import error_click
from sam_gym.simulation.interactive import Target, click_out

NO_POINTS = np.zeros((0, 2))


def rectangle(size: tuple[int, int], x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_a_window_shows_mask_and_points_with_a_margin() -> None:
    mask = rectangle((100, 200), 80, 45, 120, 55)
    window = Window.around(mask, NO_POINTS)
    assert window == (72, 40, 128, 60)  # 40 x 10 pixels become 56 x 20, the smallest height
    assert (window.x1 - window.x0) == MARGIN * 40 and window.size[0] == SMALLEST * 200
    wider = Window.around(mask, np.array([[40.0, 50.0]]))
    assert wider.x0 < 40 < wider.x1 and wider.inside(np.array([[40.0, 50.0], [39.0, 99.0]])).any()
    assert list(wider.inside(np.array([[40.0, 50.0], [199.0, 50.0]]))) == [True, False]


def test_a_window_keeps_its_size_at_the_border() -> None:
    inner = Window.around(rectangle((100, 200), 80, 40, 100, 60), NO_POINTS)
    corner = Window.around(rectangle((100, 200), 180, 80, 200, 100), NO_POINTS)
    assert corner.size == inner.size and (corner.x1, corner.y1) == (200, 100)


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((50, 80), bool),
        np.ones((50, 80), bool),
        rectangle((50, 80), 0, 0, int(LARGEST / MARGIN * 80) + 2, 9),
    ],
)
def test_nothing_or_a_large_mask_shows_the_whole_image(mask: np.ndarray) -> None:
    assert Window.around(mask, NO_POINTS) == Window.whole((50, 80)) == (0, 0, 80, 50)


def test_iou_of_windows_by_hand() -> None:
    assert Window(0, 0, 4, 4).iou(Window(2, 0, 6, 4)) == pytest.approx(8 / 24)
    assert Window(0, 0, 4, 4).iou(Window(5, 5, 6, 6)) == 0


def test_low_res_logits_are_those_of_the_window(tiny: Backbone) -> None:
    """Decoded logits, at the size of an image and back, are the same up to interpolation."""
    shape = (120, 90)
    height, width = (side // 4 for side in tiny.input_size(shape))
    smooth = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.interpolate(smooth, tiny.mask_shape, mode="bilinear")[0, 0]
    full = tiny.masks_at(logits, shape)
    back = low_res_logits(tiny, full, Window.whole(shape))
    inside = (slice(0, height - 1), slice(0, width - 1))
    assert (back - logits)[inside].abs().mean() < 0.05 * logits.std()
    assert back[:, width + 1 :].max() == pytest.approx(float(full.min()))
    # The left half fills a frame of its own, at twice the resolution.
    half = low_res_logits(tiny, full, Window(0, 0, 45, 60))
    assert torch.allclose(half[::2, ::2][:7, :5], back[:7, :5], atol=0.3 * float(logits.std()))


@pytest.fixture(scope="module")
def small_objects() -> list[Target]:
    """Objects of scenes that fill a quarter of the side of their image."""
    targets = []
    for index in range(2):
        scene = Scenes("val")[index]
        image = np.full((1024, 1024, 3), 128, np.uint8)
        image[384:640, 384:640] = scene.image
        for mask in scene.masks:
            placed = np.zeros((1024, 1024), bool)
            placed[384:640, 384:640] = mask
            targets.append(Target(image, placed))
    return targets


def test_zoom_sharpens_small_objects(shipped: Backbone, small_objects: list[Target]) -> None:
    plain, zoomed = (
        np.mean([session.ious for session in click_out(shipped, small_objects, 3, zoom=zoom)], 0)
        for zoom in (False, True)
    )
    assert (zoomed - plain > (0.02, 0.2, 0.3)).all()


def test_batching_does_not_change_zoomed_clicks(
    shipped: Backbone, small_objects: list[Target]
) -> None:
    together = click_out(shipped, small_objects[:3], 3, zoom=True)
    for session, target in zip(together, small_objects, strict=False):
        (alone,) = click_out(shipped, [target], 3, zoom=True)
        assert alone.clicks == session.clicks
        np.testing.assert_allclose(alone.ious, session.ious, atol=2e-3)


def test_the_predictor_zooms_as_simulated_users_do(
    shipped: Backbone, small_objects: list[Target]
) -> None:
    """One click each on two images, one of them twice; a large object is not looked at again."""
    scene = Scenes("val")[0]
    large = Target(scene.image[100:160, 100:180], np.ones((60, 80), bool))
    targets = [small_objects[0], small_objects[0], large]
    clicks = [error_click(target.mask, np.zeros_like(target.mask)) for target in targets]
    assert all(clicks)
    predictor = Predictor(shipped)
    predictor.set_images([small_objects[0].image, large.image])
    places = [[[click.x, click.y]] for click in clicks if click]
    points, labels = [places[:2], places[2:]], [[[1], [1]], [[1]]]
    masks, scores, logits = predictor.predict(points, labels, zoom=True)
    assert [own.shape for own in masks] == [(2, 1, 1024, 1024), (1, 1, 60, 80)]
    assert [own.shape for own in scores] == [(2, 1), (1, 1)]
    assert logits[0].shape == (2, 1, *shipped.mask_shape)
    expected = click_out(shipped, targets, 1, zoom=True)
    for mask, session in zip([*masks[0], *masks[1]], expected, strict=True):
        assert np.mean(mask[0] == session.mask) > 0.9999
    # The low-res logits are those of the image: they prompt the next call.
    again = predictor.predict(points, labels, masks=[own[:, 0] for own in logits], zoom=True)
    for before, after in zip(masks[0][:, 0], again.masks[0][:, 0], strict=True):
        assert (before & after).sum() > 0.8 * (before | after).sum()
