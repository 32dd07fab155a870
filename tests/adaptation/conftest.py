"""The tiny SAM by name, streams of a few small images, and trainers over them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from adaptation.combined import CombinedOptions
from adaptation.features import FeatureBank
from adaptation.options import TrainConfig
from adaptation.results import RunResult
from adaptation.strategy import STRATEGIES, Strategy
from adaptation.trainer import Trainer
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.prompts import Prompts
from sam_gym.data.streams import Stream, make_stream

#: Few steps of everything.
FEW = {"selector_steps": 4, "fisher_samples": 3, "buffer_images": 2, "buffer_embeddings": 3}


def few_options(method: str, **more: Any) -> Any:
    """A method's options, with few steps and the values given."""
    if "+" in method:
        return CombinedOptions({name: few_options(name) for name in method.split("+")})
    cls = STRATEGIES.get(method).Options
    names = {field.name for field in fields(cls)}
    return cls(**({name: value for name, value in FEW.items() if name in names} | more))


class QuickTrainer(Trainer):
    """A trainer that gives methods `few_options` by default."""

    def fit(self, stream: Any, strategy: str = "naive", *args: Any, **more: Any) -> RunResult:
        if strategy in STRATEGIES.names() or "+" in strategy:
            more.setdefault("method_options", few_options(strategy))
        return super().fit(stream, strategy, *args, **more)


@pytest.fixture(scope="session")
def tiny_name(
    build_tiny: Callable[[], Sam],
    tiny_checkpoint: str,
    backbone_added: Callable[..., AbstractContextManager[None]],
) -> Iterator[dict[str, Any]]:
    """What `load_backbone` takes for the tiny SAM, which has a name as long as this lives."""
    with backbone_added("tiny", build=build_tiny):
        yield {"name": "tiny", "checkpoint": tiny_checkpoint, "device": "cpu"}


@pytest.fixture(scope="session")
def loaded(tiny_name: dict[str, Any]) -> Backbone:
    """The backbone that all trainers over the tiny SAM share."""
    return load_backbone(**tiny_name)


def few_images(*domains: str, **more: Any) -> Stream:
    sizes = {"train_images": 4, "val_images": 2, "test_images": 3, "size": 64}
    return make_stream("scenes-domains", domains=domains, **(sizes | more))


@pytest.fixture(scope="session")
def stream() -> Stream:
    """Three domains of 64 x 64 pixels."""
    return few_images("cells", "night", "sonar")


@pytest.fixture(scope="session")
def pair(stream: Stream) -> Stream:
    """The first two of them."""
    return Stream("pair", stream.domains[:2])


@pytest.fixture
def make_trainer(tiny_name: dict[str, Any]) -> Callable[..., Trainer]:
    """Trainers of a few steps; settings of `TrainConfig` as keywords."""

    def make(out: Path | None = None, retention: Any = None, **settings: Any) -> Trainer:
        few = {"steps": 3, "batch_size": 4, "augmentations": 2, "objects_per_image": 3}
        config = TrainConfig(**(few | settings))
        return QuickTrainer(config, tiny_name, out, retention, progress=False)

    return make


@pytest.fixture
def fitted(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Strategy]]:
    """Runs a method; returns its result and the strategy at its end."""

    def fit(stream: Stream, method: str, tune: str | None = None, **settings: Any) -> Any:
        made: list[Strategy] = []
        cls = STRATEGIES.get(method)
        init = cls.__init__

        def noted(self: Strategy, context: Any) -> None:
            init(self, context)
            made.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(cls, "__init__", noted)
            run = make_trainer(**settings).fit(stream, method, tune)
        return run, made[-1]

    return fit


@pytest.fixture
def bank(loaded: Backbone, pair: Stream) -> FeatureBank:
    return FeatureBank(loaded, pair, augmentations=2, objects_per_image=3)


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Backbone, Model], torch.Tensor]:
    """Masks of a model for a box on each of a few images that look like different domains."""

    images = [few_images(name)[0].split("test")[0].image for name in ("cells", "night")]
    images += [np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)]

    def logits_of(backbone: Backbone, model: Model) -> torch.Tensor:
        adapted = backbone.with_model(model)
        boxes = torch.tensor([[8.0, 8, 40, 50], [20, 5, 60, 60], [3, 30, 30, 55]])
        return adapted.decode(adapted.encode(images), Prompts(boxes=boxes))[0]

    return logits_of
