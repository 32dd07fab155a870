"""The video tracker against the authors' predictor, small, with random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.video_speed.peer import Shape, build_predictor
from sam_gym.backbones import Backbone
from sam_gym.backbones.sam2 import Sam2Encoder, assemble_sam2, split_state
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.backbones.video.session import TrackingSession
from sam_gym.backbones.video.tracker import VideoTracker

pytest.importorskip("sam2", reason="the package sam2 is not installed")

SIZE, WIDTH, FRAMES = 128, 256, 24
HEIGHT, LENGTH = 96, 150
TRUNK = {
    "embed_dim": 8,
    "stages": (1, 2, 2, 1),
    "window_spec": (8, 4, 6, 3),
    "global_att_blocks": (4,),
}
#: How far logits may be from the authors', in units of the standard deviation of theirs.
TOLERANCE = 1e-4


def build_authors(postprocess: bool) -> Any:
    extra = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    torch.manual_seed(0)
    model = build_predictor(
        Shape(SIZE, WIDTH, 2, 64, TRUNK),
        sam_mask_decoder_extra_args=extra if postprocess else None,
        binarize_mask_from_pts_for_mem_enc=postprocess,
    )
    with torch.no_grad():
        # Both signs of the object score occur.
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].weight.mul_(100.0)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(-9.53)
        model.sam_mask_decoder.iou_prediction_head.layers[-1].weight.mul_(20.0)
    return model


def frames() -> np.ndarray:
    """Blobs that move over a pattern: uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[:HEIGHT, :LENGTH]
    ground = rng.integers(0, 256, (HEIGHT, LENGTH, 3))
    video = np.repeat(ground[None], FRAMES, axis=0)
    for number in range(3):
        colour, (x, y), (dx, dy) = (
            rng.integers(0, 256, 3),
            rng.uniform(30, 90, 2),
            rng.normal(0, 2, 2),
        )
        for t in range(FRAMES):
            video[t][np.hypot(rows - y - dy * t, columns - x - dx * t) < 15 + number] = colour
    return video.astype(np.uint8)


class Pair:
    """The same prompts for both."""

    def __init__(self, postprocess: bool, folder: Path) -> None:
        self.authors = build_authors(postprocess)
        sam = assemble_sam2(Sam2Encoder(SIZE, WIDTH, **TRUNK))
        image, memory = split_state(self.authors.state_dict())
        sam.load_state_dict(image)
        own = VideoMemory((8, 8), WIDTH, hidden=64, depth=2)
        own.load_state_dict(memory)
        backbone = Backbone("tiny_sam2", sam, torch.device("cpu"), torch.float32)
        tracker = VideoTracker(backbone, own, correct="sam2", postprocess=postprocess, batch_size=3)
        video = frames()
        for number, frame in enumerate(video):
            Image.fromarray(frame).save(folder / f"{number}.jpg", quality=95)
        video = np.stack([np.array(Image.open(folder / f"{k}.jpg")) for k in range(FRAMES)])
        self.session: TrackingSession = tracker.open([video])
        self.state = self.authors.init_state(str(folder))

    def click(
        self, frame: int, object: int, points: Any = None, labels: Any = None, box: Any = None
    ) -> None:
        *_, masks = self.authors.add_new_points_or_box(
            self.state, frame, object, points, labels, box=box
        )
        shown = self.session.prompt(0, frame, object, points, labels, box)
        self.compare(shown, masks)

    def mask(self, frame: int, object: int, mask: np.ndarray) -> None:
        *_, masks = self.authors.add_new_mask(self.state, frame, object, mask)
        self.compare(self.session.prompt(0, frame, object, mask=mask), masks)

    def compare(self, shown: Any, masks: torch.Tensor) -> None:
        """Logits at the size of the frame, and which objects are absent."""
        own = self.session.tracker.backbone.masks_at(shown.logits, shown.size)
        theirs = masks[:, 0]
        absent = theirs.flatten(1).amax(dim=1) < -500
        assert torch.equal(shown.logits.flatten(1).amax(dim=1) < -500, absent)
        scale = theirs[~absent].std() if (~absent).any() else 1.0
        assert (own - theirs).abs().max() < TOLERANCE * scale

    def propagate(self, **options: Any) -> tuple[int, int]:
        """Compare all frames; return how many were compared, and how many objects were absent."""
        names = {"start": "start_frame_idx", "max_frames": "max_frame_num_to_track"}
        given = {names.get(name, name): value for name, value in options.items()}
        count = absent = 0
        theirs: Iterator[Any] = self.authors.propagate_in_video(self.state, **given)
        for own, (frame, objects, masks) in zip(
            self.session.propagate(**options), theirs, strict=True
        ):
            assert (own.frame, list(own.objects)) == (frame, list(objects))
            self.compare(own, masks)
            count, absent = count + 1, absent + int((own.scores <= 0).sum())
        return count, absent


@pytest.fixture(params=[False, True], ids=["plain", "postprocess"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(request.param, tmp_path)


def disk(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :LENGTH]
    return np.hypot(rows - y, columns - x) < radius


def test_points_boxes_and_masks_are_tracked_alike(pair: Pair) -> None:
    pair.click(2, 1, [[40.0, 50.0]], [1])
    pair.click(2, 5, box=[20.0, 30.0, 70.0, 90.0])
    pair.mask(4, 3, disk(80, 60, 14))
    pair.click(2, 1, [[40.0, 50.0], [90.0, 10.0]], [1, 0])
    count, absent = pair.propagate()
    assert count == FRAMES - 2 and 0 < absent < 3 * count
    assert pair.propagate(reverse=True, start=6)[0] == 7


def test_corrections_and_second_passes_agree(pair: Pair) -> None:
    pair.click(0, 1, [[60.0, 60.0]], [1])
    pair.mask(0, 2, disk(50, 80, 12))
    pair.propagate(max_frames=12)
    # Tracked before: a memory that the next pass overwrites.
    pair.click(8, 1, [[30.0, 40.0], [80.0, 80.0]], [1, 0])
    pair.mask(9, 2, disk(70, 70, 10))
    # Not tracked yet: a further conditioning frame, also a later one.
    pair.click(20, 1, [[64.0, 20.0]], [1])
    pair.propagate(start=8)
    pair.propagate(start=22, reverse=True)


@pytest.mark.parametrize("pair", [True], indirect=True, ids=["postprocess"])
def test_an_empty_mask_is_an_absent_object(pair: Pair) -> None:
    pair.mask(0, 1, np.zeros((HEIGHT, LENGTH), bool))
    pair.click(1, 2, [[60.0, 60.0]], [1])
    pair.propagate()
