"""A head that classifies pixels by frozen features of the SAM."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from adaptation.batch_norm import processes, synchronise
from adaptation.class_weights import Weighting, class_weights, count_pixels
from adaptation.evaluation import Scores, score_labels
from adaptation.features import LabelledImages
from adaptation.strategy import STRATEGIES, Step, Strategy, StrategyContext, seeded
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.adapters.semantic_head import SEMANTIC_HEADS
from sam_gym.backbones.adapters.tuning import bytes_of
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.timm_features import check_features, kind_of
from sam_gym.data.base import IGNORED, class_names
from sam_gym.data.streams import Domain
from sam_gym.metrics.semantic import class_iou, mean_score
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count
from sam_gym.utils.transfer import to_device


@dataclass(frozen=True)
class LabelledBatch:
    """Images of a step.

    Attributes:
        raw: `raw_features` of B images.
        labels: int64 (B, S, S), the class of each pixel of the frame, or `IGNORED`.
    """

    raw: ImageFeatures
    labels: Tensor


@STRATEGIES.register("semantic")
class Semantic(Strategy):
    """Trains a semantic head by cross-entropy at the size of the frame; ignored pixels are out.

    An epoch visits every training image once, in one of its augmentations. The head `seed` is
    phase 2 of github.com/erik-p04/SAM-Cityscapes-Project.
    """

    @documented
    @dataclass(frozen=True)
    class Options:
        head: Literal["seed", "pyramid"] = "seed"
        """Semantic head: seed: two convolutions on the embedding, as in the SAM-Cityscapes code;
        pyramid: a feature pyramid on all strides of the encoder."""
        features: str = "sam"
        """Features that the head classifies: sam, or, to compare with them, timm:NAME, those of a
        model of timm with its pretrained weights (timm:vit_small_patch14_dinov2.lvd142m; of a
        folder: timm:local-dir:PATH), of the same frames."""
        tiles: bool = True
        """The pyramid head also sees the four quarters of an image, each encoded at the size of the
        frame: finer masks, for five encoder calls per image."""
        epochs: Count = 5
        """Passes over the training images of a domain (--steps: optimizer steps instead)."""
        class_weights: Weighting = "enet"
        """Weights of the classes in the loss, from their pixels in the training label maps: none,
        as in the SAM-Cityscapes code; enet: 1 / ln(1.02 + frequency) (ENet); median: median
        frequency balancing (SegNet). Weights find more of rare classes, and more false ones."""

    tunes: ClassVar[tuple[str, ...]] = ("head",)
    default_tune: ClassVar[str] = "head"
    evaluations: ClassVar[tuple[str, ...]] = ("class",)
    default_batch_size: ClassVar[int] = 2

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        bank, options = context.bank, self.options
        names = {class_names(domain.split("train")) for domain in bank.stream}
        if len(names) > 1:
            raise ValueError(
                "The domains have classes of their own, and there is one semantic head for all: "
                "train on domains with the same classes."
            )
        check_features(options.features)
        make = SEMANTIC_HEADS.get(options.head)
        self._tiled = options.tiles and "tiles" in make.kinds
        self._kind = kind_of("tiles" if self._tiled else make.kinds[0], options.features)
        self._source = bank.backbone.raw_source(self._kind)
        with seeded(context.seed):
            head = make(self._kind, self._source.feature_spec, *names)
        self._head = synchronise(head).to(bank.backbone.device)
        #: Weights of the classes in the current domain, float32 (C,); None: all the same.
        self._weights: Tensor | None = None

    def _pretrained(self) -> Sam:
        return self.context.sam

    @property
    def raw(self) -> str:
        return self._kind

    @property
    def learning_rate(self) -> float:
        return 1e-3

    @property
    def module(self) -> nn.Module:
        return self._head

    @property
    def epochs(self) -> int:
        return self.options.epochs

    def epoch_steps(self, task: int, batch_size: int) -> int:
        bank = self.context.bank
        return -(-bank.count(bank.stream[task], "train") // batch_size)

    def digest(self, domain: Domain) -> str:
        return self._images(domain).digest

    def encode(self, domain: Domain) -> None:
        self.context.bank.encode_labelled(self._images(domain), self.raw)

    def before_task(self, task: int) -> None:
        super().before_task(task)
        self._head.train()
        self._weigh()

    def draw(self, step: Step) -> LabelledBatch:
        bank, device = self.context.bank, self.context.bank.backbone.device
        images, size = self._images(bank.stream[step.stage]), step.batch_size
        epoch, place = divmod(step.number, self.epoch_steps(step.stage, size))
        rng = np.random.default_rng([step.seed, 4, step.stage, epoch])
        count = len(images.images) // bank.augmentations
        order, copies = rng.permutation(count), rng.integers(bank.augmentations, size=count)
        # The last batch of an epoch is filled up with its first images.
        rows = order[np.arange(place * size, (place + 1) * size) % count]
        rows = np.split(rows, step.world)[step.rank]
        index = rows * bank.augmentations + copies[rows]
        labels = np.stack([images.labels[int(k)] for k in index])
        raw = bank.labelled_features(images, self.raw, index)
        return LabelledBatch(raw, to_device(labels, device).long())

    def forward(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        labels = batch.labels
        logits = F.interpolate(
            self._head(batch.raw).float(), labels.shape[-2:], mode="bilinear", align_corners=False
        )
        weights, valid, world = self._weights, labels != IGNORED, processes()
        total = F.cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction="sum")
        weight = valid.sum() if weights is None else weights[labels[valid]].sum()
        if world > 1:
            # Gradients are averaged over the processes, whose pixels differ in number and weight.
            torch.distributed.all_reduce(weight)
        with torch.no_grad():
            classes = logits.shape[1]
            pairs = labels[valid] * (classes + 1) + logits.argmax(dim=1)[valid]
            counts = torch.bincount(pairs, minlength=classes * (classes + 1))
            ious = class_iou(counts.reshape(classes, classes + 1).cpu().numpy())
        return total * world / weight.clamp(min=1e-6), torch.tensor(mean_score(ious))

    def score(self, model: Model, domain: Domain, evaluation: str, split: str) -> Scores:
        return score_labels(model, self.context.bank, domain, split)

    def model(self) -> Model:
        head = copy.deepcopy(self._head).requires_grad_(False)
        return Model(self.sam, "embedding", segmenter=head).eval()

    def adapter(self) -> Adapter:
        return self._adapter(
            semantic_type=self.options.head,
            semantic_features=self.raw,
            semantic_encoder=self._source.encoder_digest,
            semantic_classes=list(self._head.classes),
            semantic=self._head_state(),
        )

    def state(self) -> dict[str, Any]:
        return super().state() | {"head": self._head_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._head.load_state_dict(state["head"])
        self._head.train()
        if self.task >= 0:
            self._weigh()

    def facts(self) -> dict[str, Any]:
        if self._weights is None:
            return {}
        return {"class_weights": dict(zip(self._head.classes, self._weights.tolist(), strict=True))}

    def kept_bytes(self) -> int:
        return bytes_of(self._head.state_dict().values())

    def _images(self, domain: Domain) -> LabelledImages:
        return self.context.bank.labelled(domain, "train", 2 if self._tiled else 1)

    def _weigh(self) -> None:
        """Compute the weights of the classes in the current domain."""
        rule = self.options.class_weights
        if rule == "none":
            return
        bank, classes = self.context.bank, len(self._head.classes)
        labels = self._images(bank.stream[self.task]).labels
        counts = count_pixels((labels[k] for k in range(len(labels))), classes)
        self._weights = to_device(
            class_weights(rule, counts).astype(np.float32), bank.backbone.device
        )

    def _head_state(self) -> dict[str, Tensor]:
        return {name: x.detach().cpu().clone() for name, x in self._head.state_dict().items()}
