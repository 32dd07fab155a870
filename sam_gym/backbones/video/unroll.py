"""Track objects through clips with gradients: the computation that `VideoTracker` runs, unrolled.

All objects of a batch are prompted in the first frame and corrected in the same frames, so that
every frame is one batch. Given the same prompts, masks are those of `VideoTracker`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.decode import MaskTokens, best_token, decode_tokens
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.prompts import NO_POINT, PADDING_POINT, Prompts
from sam_gym.backbones.sam2 import VideoSam
from sam_gym.backbones.video.memory import ABSENT, Entry, Recall, VideoMemory, recall
from sam_gym.metrics.masks import batch_iou

#: Logit of the pixels of a mask prompt, and its negative outside.
CERTAIN = 10.0
#: Bound on the logits of an earlier mask that accompanies new clicks.
LIMIT = 32.0
#: Maximum number of object pointers that a frame attends to, plus one.
POINTERS = 16


@dataclass(frozen=True)
class Decoded:
    """Decoded objects: all masks, and the one that is kept.

    Attributes:
        tokens: P decoded prompts.
        multimask: bool (P,), rows that get the best of three masks.
        entry: the kept masks, in batches: logits float32 (P, hm, wm), IoU (P,), object score (P,)
            and pointers (P, C).
    """

    tokens: MaskTokens
    multimask: Tensor
    entry: Entry


def decode_objects(
    sam: VideoSam,
    memory: VideoMemory,
    features: ImageFeatures,
    prompts: Prompts,
    multimask: Tensor,
    stabilize: bool = False,
) -> Decoded:
    """Decode P objects; differentiable.

    Args:
        sam: the image model.
        memory: its memory, which makes pointers.
        features: P rows, with or without memories in their embedding.
        prompts: P prompt sets, without rows.
        multimask: bool (P,), rows that get the best of three masks.
        stabilize: replace unstable single masks (see `ScoringMaskDecoder.stability`).
    """
    decoded = decode_tokens(sam, features, prompts)
    tokens = decoded.tokens
    assert decoded.object_score is not None and tokens is not None
    score = decoded.object_score.float()
    if not stabilize:
        decoded = replace(decoded, stability=None)
    logits, iou = decoded.decode_best_masks(multimask)
    # An unstable single mask is replaced; its token still makes the pointer.
    best = best_token(decoded.iou, multimask)
    token = tokens.take_along_dim(best[:, None, None], dim=1)[:, 0]
    pointers = memory.point_to(token, score > 0)
    logits = torch.where((score > 0)[:, None, None], logits.float(), ABSENT)
    return Decoded(decoded, multimask, Entry(logits, iou.float(), score, pointers))


def mask_logits(masks: Tensor, mask_shape: tuple[int, int]) -> Tensor:
    """Low-res logits of mask prompts, which are results as they are.

    Args:
        masks: float32 (P, 1, S, S), 0 or 1, in the input frame.
        mask_shape: (hm, wm).

    Returns:
        float32 (P, hm, wm).
    """
    logits = masks * 2 * CERTAIN - CERTAIN
    return F.interpolate(logits, mask_shape, mode="bilinear", antialias=True)[:, 0]


@dataclass(frozen=True)
class FirstPrompts:
    """The prompts of P objects in the first frame of their clips, in pixels of the input frame.

    Attributes:
        clicks: points and boxes. A row of a mask has one `PADDING_POINT` only.
        is_mask: bool (P,), rows of masks.
        masks: float32 (P, 1, S, S), 0 or 1; zeros in the other rows.
        ambiguous: bool (P,), rows whose only prompt is one click.
    """

    clicks: Prompts
    is_mask: Tensor
    masks: Tensor
    ambiguous: Tensor

    def prompts(self, memory: VideoMemory) -> Prompts:
        """What the decoder sees: points and boxes, and masks in the resolution of its prompts."""
        if not self.is_mask.any():
            return self.clicks
        masks = memory.mask_downsample(self.masks)[:, 0]
        return replace(self.clicks, masks=masks, has_mask=self.is_mask)

    def results(self, sam: VideoSam, entry: Entry) -> Entry:
        """The entries of the first frame: masks are taken as they are."""
        if not self.is_mask.any():
            return entry
        given = mask_logits(self.masks, sam.prompt_encoder.mask_input_size)
        score = torch.where(self.masks.flatten(1).amax(dim=1) > 0, CERTAIN, -CERTAIN)
        is_mask = self.is_mask
        return Entry(
            torch.where(is_mask[:, None, None], given, entry.logits),
            torch.where(is_mask, 1.0, entry.iou),
            torch.where(is_mask, score, entry.score),
            entry.pointer,
        )


@dataclass(frozen=True)
class Prediction:
    """Decoded objects of a frame, to be compared with their truth.

    Attributes:
        frame: number of the frame in the clip.
        decoded: P objects.
        learn: bool (P,), rows to train; the others were given as masks.
    """

    frame: int
    decoded: Decoded
    learn: Tensor


#: Frame and decoded objects -> a click for each: points float32 (P, 1, 2), in pixels of the input
#: frame, and labels int64 (P, 1).
Corrector = Callable[[int, Decoded], tuple[Tensor, Tensor]]


def unroll(
    sam: VideoSam,
    memory: VideoMemory,
    frames: Sequence[ImageFeatures],
    rows: Tensor,
    prompts: FirstPrompts,
    clicks: dict[int, int] | None = None,
    corrector: Corrector | None = None,
    num_frames: int | None = None,
) -> list[Prediction]:
    """Track P objects through clips; differentiable.

    Args:
        sam: the image model.
        memory: its memory.
        frames: of each time, the features of B frames, one per clip, without `no_mem_embed`.
        rows: int64 (P,), the clip of each object.
        prompts: of the first frame.
        clicks: frame -> number of clicks that correct its masks; it becomes a conditioning frame.
        corrector: places the clicks.
        num_frames: length of the videos from which clips are taken (None: long), which sets the
            unit of time of pointers.

    Returns:
        One prediction per frame, and one more for each click of a corrected frame.
    """
    clicks = clicks or {}
    conditioning: dict[int, Entry] = {}
    tracked: dict[int, Entry] = {}
    predictions: list[Prediction] = []
    all_rows = torch.ones_like(prompts.is_mask)
    nothing = Prompts(
        rows.new_zeros((len(rows), 1, 2), dtype=torch.float32),
        torch.full((len(rows), 1), PADDING_POINT, device=rows.device),
    )
    for frame, features in enumerate(frames):
        own, learn, given = features[rows], all_rows, nothing
        if frame == 0:
            learn, given = ~prompts.is_mask, prompts.prompts(memory)
            lone = sam.no_mem_embed.reshape(1, -1, 1, 1) * learn[:, None, None, None]
            embedding, multimask = own.embedding + lone, prompts.ambiguous
        else:
            recalled = recall(
                frame,
                list(conditioning),
                tracked,
                num_frames=num_frames,
                memories=memory.slots,
                pointers=POINTERS,
            )
            prepared = memory.memory_attention.prepare(features.embedding)[rows]
            embedding = _attended(memory, prepared, recalled, {**conditioning, **tracked})
            multimask = all_rows
        own = own.merge(embedding=embedding)
        decoded = decode_objects(sam, memory, own, given, multimask)
        predictions.append(Prediction(frame, decoded, learn))
        for number in range(clicks.get(frame, 0)):
            assert corrector is not None
            given = _with_click(given, decoded.entry.logits, *corrector(frame, decoded))
            # A single click is ambiguous.
            multimask = torch.full_like(all_rows, frame > 0 and number == 0)
            decoded = decode_objects(sam, memory, own, given, multimask)
            predictions.append(Prediction(frame, decoded, learn))
        entry = prompts.results(sam, decoded.entry) if frame == 0 else decoded.entry
        entry.memory = memory.memorize(features.embedding, entry.logits, entry.score, rows=rows)
        (conditioning if frame == 0 or frame in clicks else tracked)[frame] = entry
    return predictions


def _with_click(given: Prompts, logits: Tensor, points: Tensor, labels: Tensor) -> Prompts:
    """Add a click to each prompt set, and the present logits as its mask."""
    assert given.points is not None and given.labels is not None
    # The token that stands for no prompt goes.
    before = torch.where(given.labels == PADDING_POINT, NO_POINT, given.labels)
    return replace(
        given,
        points=torch.cat([given.points, points], dim=1),
        labels=torch.cat([before, labels], dim=1),
        masks=logits.detach().clamp(-LIMIT, LIMIT),
        has_mask=None,
    )


def _attended(
    memory: VideoMemory, prepared: Tensor, recalled: Recall, known: dict[int, Entry]
) -> Tensor:
    """Condition P prepared frames on the memories that are recalled, all of the same frames."""

    def of_all(values: Sequence[float], kind: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=kind).expand(len(prepared), -1)

    memories = [known[frame].memory for frame, _ in recalled.frames]
    spatial = torch.stack([own for own in memories if own is not None], dim=1)
    slots = of_all([slot for _, slot in recalled.frames], torch.int64)
    pointers = torch.stack([known[frame].pointer for frame, _ in recalled.pointers], dim=1)
    ages = of_all([age / recalled.span for _, age in recalled.pointers], torch.float32)
    return memory.attend(prepared, spatial, slots, pointers, ages)


# Losses ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of `tracking_loss`, by default those of SAM 2."""

    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    score: float = 1.0


@dataclass(frozen=True)
class ClipTargets:
    """What P objects look like in the T frames of their clips.

    Attributes:
        masks: float32 (P, T, hm, wm), fraction of each low-res pixel that the object covers.
        valid: float32 (P, T, hm, wm), 1 where a pixel counts, or None: all.
        known: bool (P, T), frames in which the object is annotated.
    """

    masks: Tensor
    valid: Tensor | None
    known: Tensor

    @property
    def visible(self) -> Tensor:
        """Whether an object covers most of a low-res pixel somewhere: bool (P, T)."""
        return self.masks.flatten(2).amax(dim=2) >= 0.5


def tracking_loss(
    predictions: Sequence[Prediction],
    targets: ClipTargets,
    weights: LossWeights | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """SAM 2's loss (Ravi et al. 2024, appendix D), on low-res logits.

    Focal and Dice loss of the best of the masks that the prompt allows (three, or the single one),
    L1 loss of the predicted IoU of all of them, and cross-entropy of the object score. Masks and
    IoUs count where the object is visible only; the score also learns from frames whose mask is
    given. Terms are means over objects, and sums over predictions.

    Args:
        predictions: of `unroll`.
        targets: their truth.
        weights: of the terms (None: SAM 2's).
        temperature: divides the logits in focal and Dice loss.

    Returns:
        The loss, and numbers of the step, without gradients: the four terms without their weights,
        and `j`, the mean IoU of kept masks over tracked frames in which the object is visible.
    """
    weights = weights or LossWeights()
    terms = {name: targets.masks.new_zeros(()) for name in ("focal", "dice", "iou", "score")}
    overlaps, count = targets.masks.new_zeros(()), targets.masks.new_zeros(())
    visible = targets.visible
    for own in predictions:
        decoded, frame = own.decoded, own.frame
        target, known = targets.masks[:, frame, None], targets.known[:, frame]
        there = (visible[:, frame] & known & own.learn).float()
        counted = None if targets.valid is None else targets.valid[:, frame, None]
        logits = decoded.tokens.decode_masks().float()
        focal, dice = mask_terms(logits / temperature, target, counted)
        allowed = torch.arange(logits.shape[1], device=logits.device)[None] > 0
        allowed = allowed == decoded.multimask[:, None]
        costs = weights.focal * focal + weights.dice * dice
        best = costs.detach().masked_fill(~allowed, torch.inf).argmin(dim=1, keepdim=True)
        overlap = _overlap(logits.detach(), target, counted)
        off = ((decoded.tokens.iou.float() - overlap).abs() * allowed).sum(dim=1)
        number = len(there)
        terms["focal"] = terms["focal"] + (focal.gather(1, best)[:, 0] * there).sum() / number
        terms["dice"] = terms["dice"] + (dice.gather(1, best)[:, 0] * there).sum() / number
        terms["iou"] = terms["iou"] + (off / allowed.sum(dim=1) * there).sum() / number
        score = decoded.tokens.object_score
        assert score is not None
        present = F.binary_cross_entropy_with_logits(
            score.float(), visible[:, frame].float(), reduction="none"
        )
        terms["score"] = terms["score"] + (present * known).sum() / number
        if frame:
            kept = _overlap(decoded.entry.logits.detach()[:, None], target, counted)[:, 0]
            overlaps, count = overlaps + (kept * there).sum(), count + there.sum()
    loss = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
    numbers = {name: term.detach() for name, term in terms.items()}
    return loss, numbers | {"j": overlaps / count.clamp(min=1)}


def mask_terms(logits: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Focal loss (alpha 1/4, gamma 2) and Dice loss of each mask: (P, M) each.

    Args:
        logits: (P, M, h, w).
        target: (P, 1, h, w), from 0 to 1.
        valid: (P, 1, h, w), 1 where a pixel counts, or None: all.
    """
    target = target.expand_as(logits)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = probability * (1 - target) + (1 - probability) * target
    focal = (0.75 - 0.5 * target) * entropy * wrong.square()
    if valid is not None:
        focal, probability, target = focal * valid, probability * valid, target * valid
    overlap = (probability * target).sum(dim=(2, 3))
    sizes = probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3))
    return focal.mean(dim=(2, 3)), 1 - (2 * overlap + 1) / (sizes + 1)


def _overlap(logits: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """IoU of masks (P, M, h, w) with targets (P, 1, h, w): (P, M)."""
    return batch_iou(logits > 0, target >= 0.5, None if valid is None else valid > 0)
