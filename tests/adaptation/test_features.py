"""What trainers see of a domain: views, prompts and draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptation.features import FeatureBank
from adaptation.objects import ObjectIndices, gather_targets
from adaptation.prompting import FRACTIONS, training_prompts
from adaptation.steps import make_batch
from sam_gym.backbones import Backbone
from sam_gym.data.base import Sample
from sam_gym.data.streams import Domain, Stream
from sam_gym.simulation.interactive import box_of


class Discs:
    """Images in which every object is a disc of a colour of its own, on dark ground."""

    name = "discs"
    categories = ("object",)
    colours = ((250, 20, 20), (20, 250, 20))

    def __init__(self, height: int, width: int, ignore: bool = False, count: int = 3) -> None:
        self.shape, self.count, self.ignore = (height, width), count, ignore

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        height, width = self.shape
        image = np.full((height, width, 3), 10, np.uint8)
        y, x = np.mgrid[:height, :width]
        masks = []
        for k, colour in enumerate(self.colours):
            radius, centre = min(height, width) / 5, (1 + 2 * k) / 4
            mask = np.hypot(y - height / 2, x - width * centre) < radius + index
            image[mask] = colour
            masks.append(mask)
        ignore = None
        if self.ignore:
            ignore = np.zeros((height, width), bool)
            ignore[: height // 4] = True
        return Sample(image, np.stack(masks), np.zeros(2, np.int64), f"discs/{index}", ignore)

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        return int(rng.integers(len(self))), None


def bank_of(backbone: Backbone, *shape: int, **more: Any) -> FeatureBank:
    data = Discs(*shape, ignore=more.pop("ignore", False))
    domain = Domain("discs", False, {"train": data, "val": data, "test": data})
    return FeatureBank(backbone, Stream("discs", (domain,)), **more)


def test_the_first_view_is_the_image(loaded: Backbone) -> None:
    bank = bank_of(loaded, 64, 64, augmentations=3)
    views = bank.train(bank.stream[0])
    for number, first in enumerate(views.firsts):
        sample = bank.stream[0].split("train")[number]
        np.testing.assert_array_equal(views.frames[first], sample.image)
        for k, mask in zip(views.objects[first], sample.masks, strict=True):
            # Shares of low-res pixels: means of blocks of 4 x 4.
            shares = mask.reshape(16, 4, 16, 4).mean(axis=(1, 3))
            np.testing.assert_allclose(views.targets[k] / 255, shares, atol=1 / 255)
            np.testing.assert_array_equal(views.boxes[k], box_of(mask))
        assert views.valid[first].all()


@pytest.mark.parametrize("shape", [(128, 96), (48, 80), (40, 40)])
def test_a_first_view_of_another_size_is_as_the_service_frames_it(
    loaded: Backbone, shape: tuple[int, int]
) -> None:
    bank = bank_of(loaded, *shape, augmentations=1)
    views, domain = bank.train(bank.stream[0]), bank.stream[0]
    height, width = loaded.input_size(shape)
    for number, frame in enumerate(views.frames):
        sample = domain.split("train")[number]
        framed = loaded.framed(sample.image)[:height, :width].astype(float)
        assert np.abs(frame[:height, :width] - framed).mean() < 4
    held = bank.held_out(domain, "val")
    np.testing.assert_allclose(views.boxes, held.boxes, atol=2.0)
    # Beyond the image nothing counts.
    outside = np.ones((64, 64), bool)
    outside[: height - 1, : width - 1] = False
    blocks = outside.reshape(16, 4, 16, 4).all(axis=(1, 3))
    assert not views.valid[:][:, blocks].any()
    assert views.valid[:][:, : height // 4 - 1, : width // 4 - 1].all()


def test_masks_move_with_their_objects(loaded: Backbone) -> None:
    bank = bank_of(loaded, 96, 128, augmentations=12, seed=1)
    views = bank.train(bank.stream[0])
    assert len(np.unique(views.image)) == 3 and len(views.frames) > 30
    scales = []
    for view, objects in enumerate(views.objects):
        frame = views.frames[view].astype(float)
        for k in objects:
            inside = np.kron(views.targets[k] == 255, np.ones((4, 4), bool))
            outside = np.kron(views.targets[k] == 0, np.ones((4, 4), bool))
            red, green = frame[..., 0] - frame[..., 1], frame[..., 1] - frame[..., 0]
            colour = red if red[inside].mean() > 0 else green
            assert inside.any() and (colour[inside] > 150).mean() > 0.97
            assert (colour[outside] < 60).mean() > 0.97
            x0, y0, x1, y1 = views.boxes[k]
            ys, xs = np.nonzero(colour > 115)
            assert abs(x0 - xs.min()) <= 1.5 and abs(x1 - xs.max()) <= 1.5
            assert abs(y0 - ys.min()) <= 1.5 and abs(y1 - ys.max()) <= 1.5
            scales.append((views.targets[k] / 255).sum())
    assert max(scales) > 2 * min(scales)
    # In some views red is to the right of green: they are flipped.
    both = [v for v, objects in enumerate(views.objects) if len(objects) == 2]
    order = []
    for view in both:
        frame = views.frames[view].astype(float)
        where = [np.nonzero(frame[..., c] - frame[..., 1 - c] > 115)[1].mean() for c in (0, 1)]
        order.append(where[0] < where[1])
    assert 0.2 < np.mean(order) < 0.9


def test_ignored_pixels_do_not_count(loaded: Backbone) -> None:
    bank = bank_of(loaded, 64, 64, augmentations=1, ignore=True)
    valid = bank.train(bank.stream[0]).valid[:]
    assert not valid[:, :4].any() and valid[:, 4:].all()


def test_a_bank_is_seeded_and_made_once(loaded: Backbone) -> None:
    one, same, other = (bank_of(loaded, 64, 64, augmentations=3, seed=seed) for seed in (0, 0, 1))
    frames = [np.stack(bank.train(bank.stream[0]).frames) for bank in (one, same, other)]
    np.testing.assert_array_equal(frames[0], frames[1])
    assert frames[2].shape != frames[0].shape or (frames[2] != frames[0]).any()
    domain = one.stream[0]
    assert one.train(domain) is one.train(domain)
    first = one.raw(domain, "train", "embedding", [1, 0])
    assert one.encoded == len(frames[0])
    again = one.raw(domain, "train", "embedding", [1, 0])
    assert one.encoded == len(frames[0]) and torch.equal(first.embedding, again.embedding)


@pytest.mark.parametrize("kind", ["embedding", "pixels"])
def test_features_are_those_of_the_frames(loaded: Backbone, kind: str) -> None:
    bank = bank_of(loaded, 64, 64, augmentations=2)
    domain = bank.stream[0]
    frames = list(bank.train(domain).frames)
    expected = loaded.prepare(frames)
    if kind == "embedding":
        expected = loaded.encode(frames).embedding
    got = bank.raw(domain, "train", kind, range(len(frames)))
    assert got.names == (kind,)
    torch.testing.assert_close(got[kind], expected, rtol=1e-4, atol=1e-4)
    assert one_object_at_most(bank_of(loaded, 64, 64, augmentations=2, objects_per_image=1))
    assert len(bank_of(loaded, 64, 64, augmentations=2, max_images=2).train(domain).firsts) == 2


def one_object_at_most(bank: FeatureBank) -> bool:
    domain = bank.stream[0]
    held = bank.held_out(domain, "val")
    return len(held.rows) == 3 and all(len(o) == 1 for o in bank.train(domain).objects)


def test_memory_is_bounded(loaded: Backbone, tmp_path: Path) -> None:
    """Far more images than fit: the same features, from files, and few bytes held."""
    data = Discs(64, 64, count=60)
    domain = Domain("discs", False, {"train": data, "val": data})
    stream, kib = Stream("discs", (domain,)), 256
    plenty = FeatureBank(loaded, stream, 3)
    scarce = FeatureBank(loaded, stream, 3, memory_gib=kib / 2**20, disk=tmp_path)
    held = []
    for bank in (plenty, scarce):
        images = bank.train(domain)
        everything = range(len(images.frames))
        assert len(everything) > 150
        features = bank.raw(domain, "train", "embedding", everything)
        held.append((images, features, bank.held_out(domain, "val"), bank.nbytes))
    for name in ("targets", "valid", "empty"):
        one, other = (getattr(images, name)[:] for images, *_ in held)
        np.testing.assert_array_equal(one, other)
    assert torch.equal(held[0][1].embedding, held[1][1].embedding)
    for one, other in zip(held[0][2].masks, held[1][2].masks, strict=True):
        np.testing.assert_array_equal(one, other)

    # Whatever is read, in whatever order, no more is held, and nothing is encoded twice.
    rng, encoded, peak = np.random.default_rng(0), scarce.encoded, 0
    images = scarce.train(domain)
    targets = sum(part.nbytes for part in (images.targets, images.valid, images.empty))
    assert targets < 0.7 * sum(part[:].nbytes for part in (images.targets, images.valid))
    for _ in range(20):
        index = rng.integers(len(images.frames), size=24)
        got = scarce.raw(domain, "train", "embedding", index).embedding
        assert torch.equal(got, held[0][1].embedding[torch.from_numpy(index)])
        assert scarce.pixels(domain, "train", index[:2]).shape == (2, 3, 64, 64)
        peak = max(peak, scarce.nbytes)
    assert scarce.encoded == encoded
    assert peak - targets <= kib * 2**10 < held[0][3] - targets


def test_features_that_do_not_fit_are_kept_in_the_default_folder(
    loaded: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAM_GYM_HOME", str(tmp_path))
    for memory, files in ((1.0, 0), (2**-17, 9)):
        bank = bank_of(loaded, 64, 64, augmentations=3, memory_gib=memory)
        bank.encode(bank.stream[0], "train", "embedding")
        assert len(list(tmp_path.rglob("*.safetensors"))) == files


def test_a_domain_without_large_objects_is_named(loaded: Backbone) -> None:
    bank = bank_of(loaded, 64, 64)
    whole = bank.stream[0].datasets["train"][0]
    speck = np.zeros((1, 64, 64), bool)
    speck[0, 5, 5] = True
    empty: Any = [Sample(whole.image, speck, np.zeros(1, np.int64), "speck")]
    stream = Stream("s", (Domain("specks", False, {"train": empty}),))
    with pytest.raises(ValueError, match="'specks': no training image shows an object"):
        FeatureBank(loaded, stream).train(stream[0])


def test_objects_too_small_to_train_on_are_counted(loaded: Backbone) -> None:
    image = np.full((64, 64, 3), 10, np.uint8)
    masks = np.zeros((3, 64, 64), bool)
    masks[0, 20:40, 20:40] = True
    masks[1, 5, 5] = True  # too small at any scale
    masks[2, 30, 42:45] = True  # 3 pixels, of which 4.1 are asked for: large enough when scaled
    sample = Sample(image, masks, np.zeros(3, np.int64), "all")
    train: Any = [sample, sample]
    stream = Stream("s", (Domain("specks", False, {"train": train}),))
    with pytest.warns(UserWarning, match=r"specks: 4 of 6 objects are smaller than 0\.1% of the"):
        views = FeatureBank(loaded, stream, augmentations=1).train(stream[0])
    assert all(len(own) == 1 for own in views.objects)
    with pytest.warns(UserWarning, match=r"specks: 2 of 6 objects are smaller"):
        views = FeatureBank(loaded, stream, augmentations=12).train(stream[0])
    assert {len(own) for own in views.objects} == {1, 2}


# Draws -----------------------------------------------------------------------------------------


def test_domains_are_drawn_evenly_and_only_allowed_views(bank: FeatureBank) -> None:
    rng = np.random.default_rng(0)
    views = [bank.train(domain) for domain in bank.stream]
    allowed = [np.array([1, 2]), np.array([0])]
    draw = ObjectIndices.draw(rng, 400, list(zip(range(2), views, allowed, strict=True)))
    assert 150 < (draw.domains == 0).sum() < 250
    for task in range(2):
        seen = views[task].rows[draw.objects[draw.domains == task]]
        assert set(seen) == set(allowed[task])
    halves = draw.part(0, 2), draw.part(1, 2)
    assert [len(half.objects) for half in halves] == [200, 200]
    np.testing.assert_array_equal((halves[0] + halves[1]).objects, draw.objects)


def test_objects_of_one_view_are_drawn_together(bank: FeatureBank) -> None:
    views = [bank.train(domain) for domain in bank.stream]
    places = [(task, own, np.arange(len(own.frames))) for task, own in enumerate(views[:2])]
    repeated = 0
    for per_view in (2, 3, 5):
        draw = ObjectIndices.draw(np.random.default_rng(0), 24, places, per_view)
        assert len(draw.objects) == len(draw.domains) == 24
        for first in range(0, 24, per_view):
            group = slice(first, first + per_view)
            (task,) = set(draw.domains[group])
            (view,) = set(views[task].rows[draw.objects[group]])
            there = len(views[task].objects[view])
            _, counts = np.unique(draw.objects[group], return_counts=True)
            assert len(counts) == min(there, len(draw.objects[group]))
            assert counts.max() - counts.min() <= 1
            repeated += counts.max() > 1
        assert len(gather_targets(bank, draw, "pixels").raw) <= -(-24 // per_view)
    assert repeated


def test_what_is_gathered_belongs_to_the_objects(bank: FeatureBank) -> None:
    draw = ObjectIndices(np.array([1, 0, 1, 0, 1]), np.array([3, 0, 0, 2, 3]))
    for kind in ("embedding", "pixels"):
        got = gather_targets(bank, draw, kind)
        assert len(got.raw) <= 5
        for k, (task, number) in enumerate(zip(draw.domains, draw.objects, strict=True)):
            domain = bank.stream[int(task)]
            views = bank.train(domain)
            view = views.rows[number]
            features = bank.raw(domain, "train", kind, [view])[kind][0]
            torch.testing.assert_close(got.raw[kind][got.rows[k]], features)
            np.testing.assert_allclose(got.targets[k], views.targets[number] / 255, atol=1e-6)
            np.testing.assert_array_equal(got.valid[k], views.valid[view])
            np.testing.assert_array_equal(got.boxes[k], views.boxes[number])
            assert got.categories[k] == views.categories[number]


# Prompts ---------------------------------------------------------------------------------------


def disc_targets(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Discs that are nowhere square, as low-res shares, and their boxes in a 64 x 64 frame."""
    y, x = np.mgrid[:64, :64]
    masks = [np.hypot(y - 30, (x - 20 - k % 9) * 1.5) < 8 + k % 7 for k in range(count)]
    low = np.stack([mask.reshape(16, 4, 16, 4).mean(axis=(1, 3)) for mask in masks])
    boxes = np.stack([box_of(mask) for mask in masks])
    return torch.from_numpy(low).float(), torch.from_numpy(boxes)


def test_prompts_show_the_object() -> None:
    count = 600
    targets, boxes = disc_targets(count)
    rows = torch.arange(count) // 2
    prompts, ambiguous = training_prompts(np.arange(count), targets, boxes, rows, 64)
    assert prompts.points is not None and prompts.labels is not None
    assert prompts.boxes is not None and prompts.masks is not None
    assert prompts.has_box is not None and prompts.has_mask is not None
    points = (prompts.labels >= 0).sum(dim=1)
    only_points = ~prompts.has_box & ~prompts.has_mask
    shares = {"box": prompts.has_box, "points": only_points, "mask": prompts.has_mask}
    for name, which in shares.items():
        assert abs(float(which.float().mean()) - FRACTIONS[name]) < 0.06
    assert not (prompts.has_box & prompts.has_mask).any() and not points[prompts.has_box].any()
    assert points[only_points].min() == 1 and points.max() == 10
    assert set(points[prompts.has_mask].tolist()) == {0, 1}
    assert torch.equal(ambiguous, only_points & (points == 1)) and ambiguous.any()
    assert torch.equal(prompts.rows, rows)

    for k in range(count):
        for (x, y), label in zip(prompts.points[k], prompts.labels[k], strict=True):
            if label >= 0:
                assert label == 1
                # The low-res pixel in which the point lies; frame pixels reach from -0.5.
                assert targets[k, int((y + 0.5) // 4), int((x + 0.5) // 4)] >= 0.5
    assert torch.equal(prompts.boxes[:, :2].le(prompts.boxes[:, 2:]), torch.ones(count, 2) > 0)
    exact = (prompts.boxes == boxes).all(dim=1)
    assert 0.4 < float(exact.float().mean()) < 0.6
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    off = ((prompts.boxes - boxes) / sides)[~exact]
    assert 0.08 < float(off.std()) < 0.12 and abs(float(off.mean())) < 0.01

    assert set(prompts.masks.unique().tolist()) == {-6.0, 6.0}
    wrong = (prompts.masks > 0) != (targets >= 0.5)
    assert 0 < float(wrong.float().mean()) < 0.2
    # Far inside and far outside no pixel is wrong.
    assert not wrong[targets.sum(dim=(1, 2)) > 0][:, 15].any()


def test_a_prompt_depends_on_its_own_seed_alone() -> None:
    targets, boxes = disc_targets(40)
    seeds, rows = np.arange(40) + 7, torch.arange(40)
    whole, ambiguous = training_prompts(seeds, targets, boxes, rows, 64)
    for part in ([3], [5, 31, 2], list(range(20, 40))):
        some, own = training_prompts(seeds[part], targets[part], boxes[part], rows[part], 64)
        assert torch.equal(own, ambiguous[part])
        for name in ("boxes", "has_box", "masks", "has_mask", "rows"):
            assert torch.equal(getattr(some, name), getattr(whole, name)[part]), name
        most = some.labels.shape[1]  # type: ignore[union-attr]
        assert torch.equal(some.labels, whole.labels[part][:, :most])  # type: ignore[index]
        given = some.labels >= 0  # type: ignore[operator]
        assert torch.equal(some.points[given], whole.points[part][:, :most][given])  # type: ignore[index]
    again, _ = training_prompts(seeds, targets, boxes, rows, 64)
    assert torch.equal(again.points, whole.points) and torch.equal(again.masks, whole.masks)  # type: ignore[arg-type]


def test_processes_share_a_batch(bank: FeatureBank) -> None:
    rng = np.random.default_rng(0)
    draw = ObjectIndices.draw(rng, 6, [bank.pool(0)])
    seeds = rng.integers(2**63, size=6)
    whole = make_batch(bank, draw, "embedding", seeds)
    for rank in range(2):
        own = slice(3 * rank, 3 * rank + 3)
        part = make_batch(bank, draw.part(rank, 2), "embedding", seeds[own])
        assert torch.equal(part.targets, whole.targets[own])
        assert torch.equal(part.ambiguous, whole.ambiguous[own])
        assert torch.equal(part.prompts.boxes, whole.prompts.boxes[own])  # type: ignore[index, arg-type]
        shown = whole.raw.embedding[whole.prompts.rows[own]]  # type: ignore[index]
        assert torch.equal(part.raw.embedding[part.prompts.rows], shown)  # type: ignore[index]
