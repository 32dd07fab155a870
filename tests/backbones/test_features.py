"""Image features: named tensors that are indexed, joined, moved and stored whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from sam_gym.backbones import Backbone
from sam_gym.backbones.adapters.routers import EmbeddingRouter, RoutedModel
from sam_gym.backbones.embeddings.disk import DiskStore
from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.backbones.features import FeatureSpec, ImageFeatures, TensorSpec
from sam_gym.backbones.protocols import BackboneService, FeatureSource
from sam_gym.utils.digest import image_digest


def some(count: int = 4) -> ImageFeatures:
    return ImageFeatures(
        {
            "embedding": torch.arange(24.0).reshape(4, 3, 2, 1)[:count],
            "route": torch.tensor([5, 2**40, 7, 8])[:count],
        }
    )


def test_names_and_rows() -> None:
    features = some()
    assert len(features) == 4 and features.names == ("embedding", "route")
    assert torch.equal(features["embedding"], features.embedding)
    assert "route" in features and "hq" not in features
    for rows in (slice(1, 3), torch.tensor([1, 2]), [1, 2], torch.tensor([0, 1, 1, 0]).bool()):
        part = features[rows]
        assert torch.equal(part.embedding, features.embedding[1:3])
        assert part["route"].tolist() == [2**40, 7]
    with pytest.raises(ValueError, match="Unknown image feature 'embeding'. Did you mean"):
        features["embeding"]
    with pytest.raises(TypeError, match=r"use \[0:1\]"):
        next(iter(features))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"use \[1:2\]"):
        features[np.int64(1)]  # type: ignore[call-overload]


def test_joining_splitting_and_precision() -> None:
    features = some()
    again = ImageFeatures.cat(features.split(3))
    torch.testing.assert_close(again.tensors, features.tensors, rtol=0, atol=0)
    half = features.floating_to(torch.float16)
    assert half.embedding.dtype == torch.float16 and half["route"].dtype == torch.int64
    assert half["route"].tolist() == features["route"].tolist()
    merged = features.merge(hq=torch.zeros(4, 1, 2, 2), route=torch.zeros(4).long())
    assert merged.names == ("embedding", "route", "hq") and not merged["route"].any()
    assert features["route"].any()
    for parts in ([features, merged], [merged, features]):
        with pytest.raises(ValueError, match="Features differ"):
            ImageFeatures.cat(parts)
    with pytest.raises(ValueError, match="Features differ"):
        features[slice(0, 4)] = merged


def test_specs() -> None:
    spec = some().spec
    assert spec == FeatureSpec(
        {"embedding": TensorSpec((3, 2, 1)), "route": TensorSpec((), torch.int64)}
    )
    assert spec.nbytes == 4 * 6 + 8
    table = spec.empty(5, torch.device("cpu"))
    assert len(table) == 5 and table.spec == spec
    table[torch.tensor([4, 0])] = some(2)
    assert table["route"][[4, 0]].tolist() == [5, 2**40]


@pytest.fixture
def routed(tiny: Backbone) -> Backbone:
    """A tiny SAM with 40 experts, whose router sends images to different ones."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        router = EmbeddingRouter(tiny.embedding_shape[0], 40)
        torch.nn.init.normal_(router.layers[-1].weight, std=40.0)
    return tiny.with_model(RoutedModel(tiny.sam, [tiny.sam] * 40, router, "embedding"))


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256 - 30 * k, (64, 64, 3), dtype=np.uint8) for k in range(6)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stores_hold_all_features(routed: Backbone, tmp_path: Path, dtype: str) -> None:
    """Expert numbers are exact on disk in any precision; before, they were rounded floats."""
    expected = routed.encode(images())
    assert expected.spec == routed.feature_spec and len(expected["route"].unique()) > 1
    for _ in range(2):
        store = EmbeddingStore(routed, disk=DiskStore(routed, tmp_path, dtype))
        assert store.capacity == 2**30 // routed.feature_spec.nbytes
        got = store.gather(torch.tensor(store.acquire(images())))
        assert got.spec == routed.feature_spec
        assert torch.equal(got["route"], expected["route"])
        kept = expected.embedding.to(getattr(torch, dtype)).float()
        torch.testing.assert_close(got.embedding, kept, rtol=0, atol=1e-6 + (dtype != "float32"))
    assert store.encoded == 0


def test_files_of_single_tensors_are_read_and_others_are_missing(
    tiny: Backbone, routed: Backbone, tmp_path: Path
) -> None:
    """As commit 84a4160 wrote them; there, features beside the embedding were further channels."""
    import hashlib

    for backbone, channels in ((tiny, 32), (routed, 33)):
        disk, key = DiskStore(backbone, tmp_path / str(channels)), image_digest(images()[0])
        embedding = torch.randn(channels, *backbone.embedding_shape[1:])
        checksum = hashlib.sha256(embedding.numpy().data).hexdigest()
        path = disk.path(key)
        path.parent.mkdir()
        path.write_bytes(save({"embedding": embedding}, metadata={"sha256": checksum}))
        got = disk.get(key)
        if backbone is routed:
            assert got is None
        else:
            assert got is not None and torch.equal(got.embedding[0], embedding)


def test_raw_features_are_a_source_for_stores(tiny: Backbone, tmp_path: Path) -> None:
    source: FeatureSource
    for kind, names in (
        ("pixels", ("pixels",)),
        ("embedding", ("embedding",)),
        ("early", ("embedding", "early")),
    ):
        source = tiny.raw_source(kind)
        store = EmbeddingStore(source, disk=DiskStore(source, tmp_path))
        got = store.gather(torch.tensor(store.acquire(images())))
        assert got.names == names and got.spec == source.feature_spec
        assert (source.identity == tiny.identity) == (kind == "embedding")
    with pytest.raises(ValueError, match="Unknown kind of raw features 'earl'"):
        tiny.raw_source("earl").encode(images())


def test_a_backbone_is_a_service(tiny: Backbone) -> None:
    service: BackboneService = tiny
    assert service.embedding_shape == tiny.feature_spec.tensors["embedding"].shape
    assert service.mask_threshold == 0.0 and service.classes == ()
