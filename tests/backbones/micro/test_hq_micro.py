"""`hq_micro`: micro with the HQ head of the package on it."""

import numpy as np
import torch

from sam_gym.backbones import Backbone, Prompts, load_backbone
from sam_gym.backbones.hq import in_head
from sam_gym.backbones.micro.model import build_hq_micro, build_micro
from sam_gym.data import make_dataset


def test_it_has_the_weights_of_micro_and_a_head(shipped: Backbone) -> None:
    backbone = load_backbone("hq_micro", device="cpu")
    state, plain = backbone.sam.state_dict(), shipped.sam.state_dict()
    assert {key for key in state if in_head(key)} == state.keys() - plain.keys()
    assert all(torch.equal(state[key], value) for key, value in plain.items())
    assert backbone.identity != shipped.identity
    channels, height, width = shipped.embedding_shape
    assert backbone.embedding_shape == shipped.embedding_shape
    assert backbone.feature_spec.tensors["hq"].shape == (channels // 8, 4 * height, 4 * width)


def test_a_new_head_adds_nothing_to_a_mask() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        micro, hq = build_micro(), build_hq_micro()
    hq.load_state_dict(hq.state_dict() | micro.state_dict())
    with torch.no_grad():
        pixels = torch.rand(1, 3, 256, 256)
        embedding, early = hq.image_encoder.forward_with_early(pixels)
        features = hq.mask_decoder.image_features(embedding, early)
        refinement = hq.mask_decoder.refinement(torch.randn(1, 128), features, features)
    assert not refinement.any() and features.std() > 0


def test_the_head_refines_and_segments(shipped: Backbone) -> None:
    """On scenes that nothing was trained on; the numbers are in docs/results.md."""
    backbone = load_backbone("hq_micro", device="cpu")
    scenes = make_dataset("scenes", "test", length=12)
    samples = [scenes[i] for i in range(12)]
    images = [sample.image for sample in samples]
    boxes = []
    for sample in samples:
        rows, columns = (np.flatnonzero(sample.masks[0].any(axis=axis)) for axis in (1, 0))
        boxes.append([columns[0], rows[0], columns[-1], rows[-1]])
    prompts = Prompts(boxes=torch.tensor(boxes, dtype=torch.float32))
    masks = {}
    for name, model in (("micro", shipped), ("hq_micro", backbone)):
        logits, _ = model.decode(model.encode(images), prompts)
        masks[name] = (model.masks_at(logits[:, 0], images[0].shape[:2]) > 0).numpy()
    truth = np.stack([sample.masks[0] for sample in samples])
    both, either = (masks["hq_micro"] & truth), (masks["hq_micro"] | truth)
    assert np.mean(both.sum((1, 2)) / either.sum((1, 2))) > 0.7
    assert (masks["micro"] != masks["hq_micro"]).any()
