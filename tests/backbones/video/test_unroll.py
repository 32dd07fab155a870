"""Unrolled tracking: the masks of `VideoTracker`, gradients, and SAM 2's loss."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sam_gym.backbones.decode import MaskTokens
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.prompts import NO_POINT, PADDING_POINT, Prompts
from sam_gym.backbones.video.memory import Entry
from sam_gym.backbones.video.prompting import ErrorClicks, first_prompts
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.backbones.video.unroll import (
    ClipTargets,
    Decoded,
    FirstPrompts,
    LossWeights,
    Prediction,
    mask_terms,
    tracking_loss,
    unroll,
)

FRAMES, SIDE, CORRECTED = 6, 64, 3


@pytest.fixture
def frames() -> np.ndarray:
    """Frames of noise that change slowly, in the size of the input frame: uint8 (T, S, S, 3)."""
    steps = np.random.default_rng(0).normal(0, 20, (FRAMES, SIDE, SIDE, 3)).cumsum(axis=0)
    return np.clip(128 + steps, 0, 255).astype(np.uint8)


def given_prompts(mask: np.ndarray) -> FirstPrompts:
    """A mask, a click and a box."""
    masks = np.zeros((3, 1, SIDE, SIDE), np.float32)
    masks[0, 0] = mask
    points = torch.zeros(3, 1, 2)
    points[1] = torch.tensor([20.0, 30.0])
    labels = torch.tensor([[PADDING_POINT], [1], [NO_POINT]])
    boxes = torch.zeros(3, 4)
    boxes[2] = torch.tensor([10.0, 5.0, 50.0, 40.0])
    only = torch.eye(3, dtype=torch.bool)
    clicks = Prompts(points, labels, boxes, only[2])
    return FirstPrompts(clicks, only[0], torch.from_numpy(masks), only[1])


def test_masks_are_those_of_the_tracker(
    tracker: Callable[..., VideoTracker], frames: np.ndarray
) -> None:
    """Three kinds of prompts, tracked, corrected by two clicks in a later frame, and tracked on."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[10:40, 12:50] = True
    own = tracker()
    session = own.open([frames])
    session.prompt(0, 0, 0, mask=mask)
    session.prompt(0, 0, 1, [[20.0, 30.0]], [1])
    session.prompt(0, 0, 2, box=[10, 5, 50, 40])
    expected = {step.frame: step.logits for step in session.propagate(max_frames=CORRECTED)}
    clicked = [([12.0, 44.0], 1), ([50.0, 9.0], 0)]
    for point, label in clicked:
        for number in range(3):
            session.prompt(0, CORRECTED, number, [point], [label], clear=False)
    expected |= {step.frame: step.logits for step in session.propagate(start=CORRECTED)}

    encoded = [own.encode([frame]).features for frame in frames]
    calls = iter(clicked)

    def corrector(frame: int, decoded: Decoded) -> tuple[Tensor, Tensor]:
        point, label = next(calls)
        assert frame == CORRECTED
        return torch.tensor(point).expand(3, 1, 2), torch.full((3, 1), label)

    rows = torch.zeros(3, dtype=torch.int64)
    prompts = given_prompts(mask)
    predictions = unroll(
        own.sam, own.memory, encoded, rows, prompts, {CORRECTED: 2}, corrector, FRAMES
    )
    assert [own.frame for own in predictions] == [0, 1, 2, 3, 3, 3, 4, 5]
    assert predictions[0].learn.tolist() == [False, True, True]
    scale = float(expected[FRAMES - 1].std())
    for prediction in predictions[:3] + predictions[5:]:
        got, wanted = prediction.decoded.entry.logits, expected[prediction.frame]
        learned = prediction.learn
        torch.testing.assert_close(got[learned], wanted[learned], rtol=1e-4, atol=1e-4 * scale)


def test_gradients_pass_through_the_memory(
    tracker: Callable[..., VideoTracker], frames: np.ndarray
) -> None:
    """The last frame alone trains all that wrote and read memories, and made pointers."""
    own = tracker()
    encoded = [own.encode([frame]).features for frame in frames]
    memory = own.memory.requires_grad_(True)
    prompts = given_prompts(np.ones((SIDE, SIDE), bool))
    try:
        last = unroll(own.sam, memory, encoded, torch.zeros(3, dtype=torch.int64), prompts)[-1]
        last.decoded.tokens.decode_masks().square().sum().backward()
        without = {name for name, weight in memory.named_parameters() if weight.grad is None}
        assert without <= {"no_mem_pos_enc", "no_obj_ptr"}
        assert memory.mask_downsample.weight.grad.abs().sum() > 0
    finally:
        memory.requires_grad_(False).zero_grad()


def predicted(masks: Tensor, ious: Tensor, score: Tensor, multimask: Tensor) -> Decoded:
    """Decoded objects with given mask logits (P, 4, h, w)."""
    count, tokens, height, width = masks.shape
    # One feature per mask, which its embedding selects.
    features = masks.flatten(2).transpose(1, 2)[:, :, None]
    chosen = torch.eye(tokens).expand(count, -1, -1)
    own = MaskTokens(chosen, features, ious, (height, width), (1, 1), object_score=score)
    entry = Entry(masks[:, 0], ious[:, 0], score, masks.new_zeros(count, 2))
    return Decoded(own, multimask, entry)


def test_the_loss_is_that_of_sam2() -> None:
    """Against the authors' module, for three masks and for single ones; absent objects included."""
    losses = pytest.importorskip("training.loss_fns", reason="the package sam2 is not installed")
    weights = {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1}
    authors = losses.MultiStepMultiMasksAndIous(
        weights,
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=True,
        focal_gamma_obj_score=0.0,
        focal_alpha_obj_score=-1.0,
    )
    torch.manual_seed(0)
    count, length = 5, 3
    target = (torch.rand(count, length, 8, 8) > 0.5).float()
    target[2, 1] = 0
    ours, theirs = [], []
    for frame in range(length):
        many = frame != 1
        masks, ious, score = torch.randn(count, 4, 8, 8), torch.rand(count, 4), torch.randn(count)
        multimask = torch.full((count,), many)
        everything = torch.ones(count, dtype=torch.bool)
        decoded = predicted(masks, ious, score, multimask)
        ours.append(Prediction(frame, decoded, everything))
        part = slice(1, 4) if many else slice(0, 1)
        theirs.append(
            {
                "multistep_pred_multimasks_high_res": [masks[:, part]],
                "multistep_pred_ious": [ious[:, part]],
                "multistep_object_score_logits": [score[:, None]],
            }
        )
    expected = authors(theirs, target.transpose(0, 1).bool())
    known = torch.ones(count, length, dtype=torch.bool)
    loss, numbers = tracking_loss(ours, ClipTargets(target, None, known))
    torch.testing.assert_close(loss, expected["core_loss"])
    for ours_name, name in (("focal", "mask"), ("dice", "dice"), ("iou", "iou")):
        torch.testing.assert_close(numbers[ours_name], expected[f"loss_{name}"])
    torch.testing.assert_close(numbers["score"], expected["loss_class"])


def test_mask_terms_by_hand() -> None:
    """Two pixels at probability 1/2 and 3/4; the first is on the target."""
    logits = torch.tensor([0.0, np.log(3.0)]).reshape(1, 1, 1, 2)
    target = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    focal, dice = mask_terms(logits, target, None)
    first, second = 0.25 * 0.25 * np.log(2), 0.75 * 0.5625 * np.log(4)
    assert focal.item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert dice.item() == pytest.approx(1 - 2 / 3.25, rel=1e-6)
    focal, dice = mask_terms(logits, target, torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2))
    assert focal.item() == pytest.approx(first / 2, rel=1e-6)
    assert dice.item() == pytest.approx(1 - 2 / 2.5, rel=1e-6)


def test_what_is_unknown_absent_or_given_trains_no_mask() -> None:
    target = torch.ones(3, 1, 4, 4)
    target[1] = 0.0  # absent
    known = torch.tensor([[False], [True], [True]])
    masks = torch.randn(3, 4, 4, 4, requires_grad=True)
    score = torch.randn(3, requires_grad=True)
    decoded = predicted(masks, torch.rand(3, 4), score, torch.ones(3, dtype=torch.bool))
    prediction = Prediction(0, decoded, torch.tensor([True, True, False]))
    weights = LossWeights(focal=1.0, dice=1.0, iou=0.0, score=1.0)
    loss, _ = tracking_loss([prediction], ClipTargets(target, None, known), weights)
    loss.backward()
    assert masks.grad is None or not masks.grad.any()
    assert (score.grad != 0).tolist() == [False, True, True]


def test_first_prompts_lie_on_the_object() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((60, 64, 64), bool)
    masks[:, 20:30, 40:60] = True
    kinds = ["mask", "point", "box"] * 20
    prompts = first_prompts(rng.spawn(60), masks, kinds, torch.device("cpu"))
    assert prompts.is_mask.sum() == prompts.ambiguous.sum() == 20
    points = prompts.clicks.points[prompts.ambiguous][:, 0]
    assert ((points >= torch.tensor([40, 20])) & (points < torch.tensor([60, 30]))).all()
    boxes = prompts.clicks.boxes[prompts.clicks.has_box]
    assert len(boxes) == 20
    assert (boxes - torch.tensor([40.0, 20.0, 59.0, 29.0])).abs().max() <= 64 * 20 / 1024
    assert len(boxes.unique(dim=0)) > 10
    assert torch.equal(prompts.masks[:, 0].bool()[prompts.is_mask], torch.from_numpy(masks[:20]))
    assert not prompts.masks[~prompts.is_mask].any()


def test_corrections_are_clicked_where_masks_are_wrong() -> None:
    truth = torch.zeros(3, 2, 16, 16)
    truth[:, 1, 4:8, 4:12] = 1.0
    shown = torch.full((3, 16, 16), -1.0)
    shown[0, 4:8, 4:8] = 1.0  # misses columns 8 to 11
    shown[1, 4:8] = 1.0  # covers columns 0 to 3 and 12 to 15 too
    shown[2] = truth[2, 1] * 2 - 1
    masks = shown[:, None].expand(-1, 4, -1, -1)
    ones = torch.ones(3, dtype=torch.bool)
    decoded = predicted(masks, torch.rand(3, 4), torch.ones(3), ones)
    clicks = ErrorClicks(np.random.default_rng(0).spawn(3), truth, 64, from_truth=0.0)
    for _ in range(20):
        points, labels = clicks(1, decoded)
        x, y = ((points[:, 0] + 0.5) / 4).floor().long().T
        assert labels[:, 0].tolist() == [1, 0, 0]
        assert 8 <= x[0] < 12 and 4 <= y[0] < 8
        assert (x[1] < 4 or x[1] >= 12) and 4 <= y[1] < 8
        assert truth[2, 1, y[2], x[2]] == 0


def test_rows_of_one_frame_share_its_features(
    tracker: Callable[..., VideoTracker], frames: np.ndarray
) -> None:
    """Objects of two clips in one batch, and each clip alone."""
    own = tracker()
    encoded = [own.encode([frame, frame[::-1]]).features for frame in frames[:3]]
    prompts = given_prompts(np.ones((SIDE, SIDE), bool))
    together = unroll(own.sam, own.memory, encoded, torch.tensor([0, 1, 1]), prompts)
    for clip in (0, 1):
        part: list[ImageFeatures] = [own[clip : clip + 1] for own in encoded]
        alone = unroll(own.sam, own.memory, part, torch.zeros(3, dtype=torch.int64), prompts)
        rows = [0] if clip == 0 else [1, 2]
        for one, other in zip(together, alone, strict=True):
            got, wanted = one.decoded.entry.logits[rows], other.decoded.entry.logits[rows]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
