"""Whole objects: where their prompts are, what they cost, and what a file gives back."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adaptation.features import FeatureBank
from adaptation.losses import whole_object_loss
from adaptation.objects import ObjectIndices, gather_targets
from adaptation.prompting import points_inside
from adaptation.steps import Learner, make_batch
from adaptation.strategies.nearest import (
    extents,
    inner_grid_points,
    nearest_points,
    snapped,
    vanished,
)
from adaptation.strategies.saom import Saom
from adaptation.strategy import STRATEGIES, StrategyContext
from adaptation.trainer import Trainer, find_stream
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.class_head import ClassHead
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.decode import MaskTokens
from sam_gym.backbones.prompts import Prompts
from sam_gym.data.streams import Domain, Stream, dataset_stream

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(scope="module")
def scenes() -> Stream:
    return few_scenes()


def few_scenes() -> Stream:
    stream = dataset_stream("scenes", length=3, size=64)
    assert [domain.name for domain in stream] == ["scenes"]
    return stream


@pytest.fixture(scope="module")
def bank(loaded: Backbone, scenes: Stream) -> FeatureBank:
    return FeatureBank(loaded, scenes, augmentations=2, objects_per_image=3)


def test_the_nearest_cell_by_hand() -> None:
    """Each of three objects has a direction of its own; the strongest cell of each is known."""
    embeddings = torch.zeros(1, 3, 4, 4)
    embeddings[0, 2] = 1.0
    embeddings[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    embeddings[0, :, 0, 1] = torch.tensor([0.9, 0.1, 0.0])
    embeddings[0, :, 3, 3] = torch.tensor([0.0, 2.0, 0.0])
    targets = torch.zeros(3, 8, 8)
    targets[0, :2, :4] = 1.0
    targets[1, 6:, 6:] = 1.0
    targets[2, 4, 2] = 1.0  # a quarter of a cell
    valid = torch.ones(3, 8, 8)
    rows = torch.zeros(3, dtype=torch.int64)
    got = nearest_points(embeddings, rows, targets, valid, (4, 4), 16)
    assert vanished(targets, (4, 4)).tolist() == [False, False, True]
    # Half mean, half maximum of [1, 0, 0] and about [0.99, 0.11, 0] lies nearer to the second.
    first = F.normalize(embeddings[0, :, 0, :2], dim=0)
    query = 0.5 * first.mean(dim=1) + 0.5 * first.amax(dim=1)
    best = int((first.T @ query).argmax())
    assert got[0].tolist() == [1.5 + 4 * best, 1.5]
    assert got[1].tolist() == [13.5, 13.5]
    # Nothing fills half a cell: the cell that it fills most stands for it, and looks like the rest.
    cell = got[2].div(4).floor().long()
    assert embeddings[0, :, cell[1], cell[0]].tolist() == [0.0, 0.0, 1.0]


def test_grids_cover_the_image_and_not_its_padding() -> None:
    valid = torch.zeros(1, 8, 8)
    valid[:, 2:4, :] = 1.0  # a wide image in a square frame of 32 pixels
    box = extents(valid, 32)
    assert box.tolist() == [[[-0.5, 7.5], [31.5, 15.5]]]
    points = torch.tensor([[0.0, 8.0], [31.0, 15.0], [12.1, 30.0], [-3.0, 11.0]])
    got = snapped(points, box.expand(4, -1, -1), (16, 2))
    assert got.tolist() == [[0.5, 9.5], [30.5, 13.5], [12.5, 13.5], [0.5, 9.5]]


def test_points_inside_are_inside() -> None:
    targets = torch.zeros(20, 8, 8)
    targets[:, 3:5, 2:7] = 1.0
    drawn = [
        points_inside(np.random.default_rng(k), targets[k].numpy(), 1, 32)[0] for k in range(20)
    ]
    points = torch.from_numpy(np.array(drawn, np.float32))
    cells = ((points + 0.5) / 4).floor().long()
    assert (targets[torch.arange(20), cells[:, 1], cells[:, 0]] == 1).all()
    assert len({tuple(p.tolist()) for p in points}) == 20


def shares_at(regions: torch.Tensor, points: torch.Tensor, size: int) -> torch.Tensor:
    """Shares of low-res pixels under points, between their four nearest: float32 (P,)."""
    places = ((points + 0.5) / size * 2 - 1)[:, None, None]
    return F.grid_sample(regions[:, None], places, align_corners=False)[:, 0, 0, 0]


def test_points_of_the_grid_stay_inside() -> None:
    """Of a strip that ends in a cell of the grid, a point moved to the grid often lies beside."""
    regions = torch.zeros(40, 16, 16)
    regions[:, :, 1:5] = 1.0  # columns of the grid are at 2, 6, 10 and 14
    regions[20:] = regions[:20].transpose(1, 2)
    boxes = extents(torch.ones(40, 16, 16), 64)
    rngs = [np.random.default_rng(k) for k in range(40)]
    got, shares = inner_grid_points(rngs, regions, boxes, (4, 4), 64)
    assert torch.equal(shares, shares_at(regions, got, 64))
    assert torch.equal(snapped(got, boxes, (4, 4)), got)
    assert (shares_at(regions, got, 64) >= 0.5).all()
    assert len(got[:20].unique(dim=0)) == 4
    alone = [points_inside(np.random.default_rng(k), regions[k].numpy(), 1, 64) for k in range(40)]
    moved = snapped(torch.tensor(np.concatenate(alone)).float(), boxes, (4, 4))
    assert (shares_at(regions, moved, 64) < 0.5).any()


def test_what_is_thinner_than_the_grid_has_the_nearest_point() -> None:
    region = torch.zeros(1, 16, 16)
    region[0, 4:12, 7] = 1.0  # the grid's columns are at 2 and 6 of 16, 10 and 14
    boxes = extents(torch.ones(1, 16, 16), 64)
    got, shares = inner_grid_points([np.random.default_rng(0)], region, boxes, (4, 4), 64)
    assert got[0, 0] == 6 * 4 - 0.5 and 16 < got[0, 1] < 48
    assert shares.tolist() == [0.0]


def test_no_prompt_on_an_object_is_taught_to_be_on_nothing(bank: FeatureBank) -> None:
    """Between objects that fill the image, a seam has no point of the grid."""
    strategy: Any = STRATEGIES.get("saom_v1")(
        StrategyContext(bank, "decoder", Saom.Options(background=1.0))
    )
    draw = ObjectIndices.draw(np.random.default_rng(0), 8, [bank.pool(0)])
    objects = gather_targets(bank, draw, strategy.raw)
    objects = replace(objects, valid=torch.ones_like(objects.valid))
    seam = torch.zeros_like(objects.empty)
    seam[:4, :, 1] = True
    strategy._grid = (2, 2)  # columns of the grid are at 4 and 12 of 16
    batch = strategy.batch(replace(objects, empty=seam), np.arange(8))
    assert (batch.targets.amax(dim=(1, 2)) > 0).all()
    assert torch.equal(batch.targets, objects.targets)
    seam[:4, :, 1:6] = True
    batch = strategy.batch(replace(objects, empty=seam), np.arange(8))
    assert (batch.targets.amax(dim=(1, 2)) > 0).tolist() == [False] * 4 + [True] * 4


def test_the_mask_that_is_trusted_most_is_taught() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(3, 4, 8, requires_grad=True)
    iou = torch.rand(3, 4, requires_grad=True)
    tokens = MaskTokens(vectors, torch.randn(3, 4, 16, 8), iou, (2, 2))
    targets = (torch.rand(3, 8, 8) > 0.5).float()
    targets[2] = 0.0
    valid = (torch.rand(3, 8, 8) > 0.2).float()
    result = whole_object_loss(tokens, targets, valid)
    best = 1 + iou.detach()[:, 1:].argmax(dim=1)
    assert result.chosen.tolist() == best.tolist()
    p = result.logits.detach().sigmoid()
    entropy = F.binary_cross_entropy(p, targets, reduction="none")
    right = p * targets + (1 - p) * (1 - targets)
    focal = ((1 - right) ** 2 * entropy * valid).sum((1, 2)) / valid.sum((1, 2))
    dice = 1 - (2 * (p * targets * valid).sum((1, 2)) + 1) / (
        (p * valid).sum((1, 2)) + (targets * valid).sum((1, 2)) + 1
    )
    hits = tokens.decode_masks(vectors)[:, 1:] > 0
    truth, counts = (targets > 0.5)[:, None], (valid > 0)[:, None]
    ious = (hits & truth & counts).sum((2, 3)) / ((hits | truth) & counts).sum((2, 3))
    trust = (iou[:, 1:] - ious).square().mean(dim=1)
    assert float(result.total.detach()) == pytest.approx(
        float(((20 * focal + dice)[:2].mean() + trust.mean()).detach()), rel=1e-5
    )
    result.total.backward()
    assert vectors.grad is not None and iou.grad is not None
    # Where there is nothing, no mask is taught, but that none is to be trusted.
    assert not vectors.grad[2].any() and (iou.grad[2, 1:] > 0).all()
    for k in range(2):
        assert vectors.grad[k].abs().sum(dim=1).nonzero()[:, 0].tolist() == [int(best[k])]
        assert iou.grad[k].nonzero()[:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("tune", ["decoder", "hq", "sam_adapter"])
def test_prompts_are_points_of_the_grid(bank: FeatureBank, tune: str) -> None:
    strategy: Any = STRATEGIES.get("saom_v1")(StrategyContext(bank, tune))
    rng = np.random.default_rng(0)
    draw = ObjectIndices.draw(rng, 12, [bank.pool(0)])
    objects = gather_targets(bank, draw, strategy.raw)
    seeds = np.arange(12)
    batch = strategy.batch(objects, seeds)
    prompts = batch.prompts
    assert batch.ambiguous.all() and prompts.points.shape == (12, 1, 2)
    boxes = extents(objects.valid, 64)
    assert (boxes[:, 1] - boxes[:, 0] < 64).any(), "no view is padded"
    places = (prompts.points[:, 0] - boxes[:, 0]) / (boxes[:, 1] - boxes[:, 0]) * 32
    torch.testing.assert_close(places, places.floor() + 0.5, atol=1e-3, rtol=0)
    for part in (slice(0, 5), slice(5, 12)):
        some = gather_targets(
            bank, ObjectIndices(draw.domains[part], draw.objects[part]), strategy.raw
        )
        own = strategy.batch(some, seeds[part])
        assert torch.equal(own.prompts.points, prompts.points[part])
        assert torch.equal(own.targets, batch.targets[part])
    # Some lie on nothing, and have nothing to segment; the others are as they were.
    nothing = batch.targets.amax(dim=(1, 2)) == 0
    assert 0 < nothing.sum() < 12
    assert torch.equal(batch.targets[~nothing], objects.targets[~nothing])
    assert (shares_at(objects.empty.float(), prompts.points[:, 0], 64)[nothing] >= 0.5).all()


def test_presets_differ_in_their_grid() -> None:
    grids = {name: STRATEGIES.get(name)._grid for name in ("saom_v1", "saom_v2", "panosam")}  # type: ignore[attr-defined]
    assert grids == {"saom_v1": (32, 32), "saom_v2": (64, 64), "panosam": (320, 64)}


def test_objects_that_vanish_are_counted_and_learned(bank: FeatureBank) -> None:
    strategy = STRATEGIES.get("saom_v1")(StrategyContext(bank, "decoder"))
    count = len(bank.train(bank.stream[0]).targets)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy.before_task(0)
    text = str(caught[0].message)
    assert f"of {count} objects fill half of no cell" in text
    assert 0 < int(text.split(": ")[1].split(" ")[0]) < count


@pytest.mark.filterwarnings("ignore:.*fill half of no cell")
def test_a_run_learns_and_its_adapter_knows_classes(
    make_trainer: MakeTrainer, scenes: Stream, tiny_name: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, steps=4, prompts=("click",))
    run = trainer.fit(scenes, "saom_v1")
    assert run.tune == "decoder" and np.array(run.scores["click"]["iou"]).shape == (1, 1)
    path = tmp_path / "saom_v1-decoder-0" / "adapter.safetensors"
    adapter = Adapter.load(path)
    assert adapter.classes == list(scenes[0].split("train").categories)
    adapted = load_backbone(**tiny_name, adapter=str(path))
    assert adapted.model.classes == scenes[0].split("train").categories
    embeddings = adapted.encode([scenes[0].split("test")[0].image])
    with torch.no_grad():
        tokens = adapted.model.decode(embeddings, Prompts(boxes=torch.tensor([[4.0, 4, 40, 40]])))
        logits = adapted.model.class_logits(tokens)
    assert logits.shape == (1, 4, len(adapter.classes))
    kept = ClassHead(32, adapter.classes)
    kept.load_state_dict(adapter.head)
    torch.testing.assert_close(logits, kept(tokens.tokens).detach())
    plain = load_backbone(**tiny_name)
    assert plain.model.classes == ()
    with pytest.raises(ValueError, match="does not classify masks"):
        plain.model.class_logits(tokens)


@pytest.mark.filterwarnings("ignore:.*fill half of no cell")
def test_classes_are_learned(bank: FeatureBank) -> None:
    """Of the few objects of a few scenes, the head soon tells all classes."""
    options = Saom.Options(class_weight=5.0, inside=0.0, background=0.0)
    strategy: Any = STRATEGIES.get("saom_v1")(StrategyContext(bank, "decoder", options))
    views = bank.train(bank.stream[0])
    everything = np.arange(len(views.rows))
    objects = gather_targets(
        bank, ObjectIndices(np.zeros_like(everything), everything), "embedding"
    )
    draw = ObjectIndices(np.zeros_like(everything), everything)
    learner = Learner(strategy)
    optimizer = torch.optim.Adam(list(strategy.trained().values()), 3e-3)
    for _ in range(150):
        batch = make_batch(bank, draw, "embedding", everything, strategy.batch)
        loss, _ = learner(lambda batch=batch: batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = strategy.decode(batch)
    chosen = tokens.iou[:, 1:].argmax(dim=1) + 1
    logits = strategy._head(tokens.tokens[torch.arange(len(chosen)), chosen])
    right = (logits.argmax(dim=1) == objects.categories).float().mean()
    assert right > 0.8


@pytest.mark.filterwarnings("ignore:.*fill half of no cell")
def test_an_interrupted_run_ends_the_same(
    make_trainer: MakeTrainer,
    scenes: Stream,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = make_trainer(tmp_path / "whole", steps=4, checkpoint_every=2).fit(scenes, "saom_v1")
    cls: Any = STRATEGIES.get("saom_v1")

    def stop(self: Any, step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cls, "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path / "parts", steps=4, checkpoint_every=2).fit(scenes, "saom_v1")
    trainer = make_trainer(tmp_path / "parts", steps=4, checkpoint_every=2)
    again = trainer.fit(scenes, "saom_v1", resume=True)
    assert again.scores == whole.scores
    one, other = (
        Adapter.load(tmp_path / name / "saom_v1-decoder-0" / "adapter.safetensors").state
        for name in ("whole", "parts")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_domains_with_other_categories_are_refused(loaded: Backbone, scenes: Stream) -> None:
    other = dataset_stream("scenes", length=2, size=64, categories="mug")
    mixed = Stream("mixed", (scenes[0], Domain("mugs", False, other[0].datasets)))
    with pytest.raises(ValueError, match="one head for all"):
        STRATEGIES.get("saom_v1")(StrategyContext(FeatureBank(loaded, mixed, 1), "decoder"))


def test_datasets_are_streams_of_one_domain() -> None:
    assert find_stream("scenes").names == ("scenes",)
    with pytest.raises(ValueError, match="Unknown stream 'scene'. Did you mean 'scenes'"):
        find_stream("scene")


def test_a_model_without_a_head_has_no_classes(loaded: Backbone) -> None:
    assert Model(loaded.sam).classes == ()
