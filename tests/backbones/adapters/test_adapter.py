"""Adapters: what chooses by the image, the files, and SAMs that are loaded with them."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import Tensor

import sam_gym  # noqa: F401  (registers the environments)
from sam_gym.backbones import Backbone, Prompts, load_backbone, loading
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.class_head import CLASS_HEADS
from sam_gym.backbones.adapters.model import ADAPTER_MODULES, Model
from sam_gym.backbones.adapters.prompt_pools import (
    CodaPool,
    DualPromptPool,
    L2PPool,
    PromptedModel,
    PromptPool,
    query_of,
)
from sam_gym.backbones.adapters.routers import (
    EmbeddingRouter,
    RoutedModel,
    Router,
    TokenRouter,
    block_inputs,
    keys_of,
    pooled_embedding,
)
from sam_gym.backbones.adapters.tuning import TUNINGS, apply_tuned, trainable, tuned_weights
from sam_gym.backbones.decode import decode_tokens
from sam_gym.backbones.features import ImageFeatures
from sam_gym.utils.digest import digest_of
from sam_gym.utils.shared import SharedObjects

DOMAINS = ["one", "two", "three"]
POOLS: dict[str, Any] = {
    n: cls for n, cls in ADAPTER_MODULES.items() if issubclass(cls, PromptPool)
}


def images_of(backbone: Backbone, count: int) -> list[np.ndarray]:
    size = backbone.image_size
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def expert(sam: Sam, tune: str, seed: int) -> dict[str, Tensor]:
    """Weights as some training might leave them."""
    own = TUNINGS.get(tune).prepare(sam)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(own).values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return tuned_weights(own)


def router_of(sam: Sam, router: str) -> Router:
    torch.manual_seed(3)
    if router == "tokens":
        return TokenRouter(sam.image_encoder.patch_embed.proj.out_channels, len(DOMAINS), 4)
    selector = EmbeddingRouter(sam.prompt_encoder.embed_dim, len(DOMAINS))
    selector.standardise(torch.randn(20, 2 * sam.prompt_encoder.embed_dim))
    return selector


def make_adapter(backbone: Backbone, tune: str = "decoder", router: str = "") -> Adapter:
    torch.manual_seed(2)
    sam, experts = backbone.sam, []
    weights: dict[str, Tensor] = {}
    if router in POOLS:
        pool = POOLS[router](sam.prompt_encoder.embed_dim, len(DOMAINS))
        for task in range(len(DOMAINS)):
            pool.begin_task(task)
        weights, tune = pool.state_dict(), "prompts"
    else:
        experts = [expert(sam, tune, seed) for seed in range(len(DOMAINS) if router else 1)]
        if router:
            weights = router_of(sam, router).state_dict()
    identity = digest_of(sam.state_dict())
    weights = {name: value.detach() for name, value in weights.items()}
    return Adapter(
        backbone.name, identity, "by hand", tune, DOMAINS, experts, router, weights
    )  # fmt: skip


# What chooses by the image ---------------------------------------------------------------------


class FixedRoutes(EmbeddingRouter):
    """The routes that are given, instead of a trained router's."""

    def __init__(self, *routes: int) -> None:
        super().__init__(32, len(DOMAINS))
        self.routes = list(routes)

    def logits(self, sam: Sam, pixels: Callable[[], Tensor], *_: Any) -> Tensor:
        count = len(pixels())
        taken, self.routes = self.routes[:count], self.routes[count:]
        return torch.eye(len(DOMAINS))[taken]


ROUTES = (2, 0, 2, 1, 0)


def routed(backbone: Backbone, tune: str, router: str = "tokens") -> RoutedModel:
    model = make_adapter(backbone, tune, router).model(backbone.sam)
    assert isinstance(model, RoutedModel)
    return model


@pytest.mark.parametrize("tune", ["decoder", "hq", "sam_adapter"])
@pytest.mark.parametrize("router", ["tokens", "embeddings"])
def test_mixed_routes_equal_each_image_alone(tiny: Backbone, tune: str, router: str) -> None:
    model = routed(tiny, tune, router)
    pixels = tiny.prepare(images_of(tiny, len(ROUTES)))
    boxes = torch.tensor([[4.0, 4, 30, 30 + 5 * k] for k in range(len(ROUTES))])
    model.router = FixedRoutes(*ROUTES)
    with torch.no_grad():
        features = model.encode(pixels)
        together = model.decode(features, Prompts(boxes=boxes))
        assert features.spec == model.feature_spec
        assert features["route"].tolist() == list(ROUTES)
        drawn = together.decode_masks()
        for k, number in enumerate(ROUTES):
            alone = Model(model.experts[number])  # type: ignore[arg-type]
            tokens = alone.decode(alone.encode(pixels[k : k + 1]), Prompts(boxes=boxes[k : k + 1]))
            expected = tokens.decode_masks()[0]
            limit = 1e-4 * float(expected.std())
            torch.testing.assert_close(drawn[k], expected, rtol=0, atol=limit)
            torch.testing.assert_close(together.iou[k], tokens.iou[0])
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3


@pytest.mark.parametrize("router", ["tokens", *POOLS])
def test_rows_say_which_image_a_prompt_is_for(tiny: Backbone, router: str) -> None:
    model = make_adapter(tiny, "decoder", router).model(tiny.sam)
    if isinstance(model, RoutedModel):
        model.router = FixedRoutes(2, 0, 1)
    rows = torch.tensor([2, 0, 0, 1, 2])
    boxes = torch.tensor([[4.0, 4, 30, 30 + 5 * k] for k in range(len(rows))])
    with torch.no_grad():
        features = model.encode(tiny.prepare(images_of(tiny, 3)))
        one = model.decode(features, Prompts(boxes=boxes, rows=rows))
        other = model.decode(features[rows], Prompts(boxes=boxes))
    expected = other.decode_masks()
    limit = 1e-4 * float(expected.std())
    torch.testing.assert_close(one.decode_masks(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("router", ["tokens", "embeddings"])
def test_the_selector_sees_what_the_frozen_encoder_sees(tiny: Backbone, router: str) -> None:
    """Whatever the experts start from, the route is the same, and the one of the selector alone."""
    pixels = tiny.prepare(images_of(tiny, 6))
    encoder = tiny.sam.image_encoder
    with torch.no_grad():
        if router == "tokens":
            selector = router_of(tiny.sam, router)
            logits = selector(encoder, keys_of(encoder, block_inputs(encoder, pixels)))  # type: ignore[operator]
        else:
            logits = router_of(tiny.sam, router)(pooled_embedding(encoder(pixels)))  # type: ignore[operator]
        for tune in ("decoder", "hq", "sam_adapter"):
            model = routed(tiny, tune, router)
            got = model.encode(pixels)["route"]
            assert torch.equal(got, logits.argmax(dim=1)), tune
    assert not any(block._forward_pre_hooks for block in encoder.blocks)


def test_tokens_look_at_the_image_as_the_encoder_would(build_tiny: Callable[[], Sam]) -> None:
    """Against plain softmax attention, written out for one head at a time."""
    sam = build_tiny()
    pixels = torch.randn(2, 3, 64, 64)
    selector = TokenRouter(32, 3, 4)
    inputs = block_inputs(sam.image_encoder, pixels)
    x = selector.tokens.expand(2, -1, -1)
    for block, image in zip(sam.image_encoder.blocks, inputs, strict=True):
        both = torch.cat([block.norm1(x), block.norm1(image.flatten(1, 2))], dim=1)
        q, k, v = block.attn.qkv(both).chunk(3, dim=-1)
        heads = []
        for part in range(2):
            one = slice(16 * part, 16 * part + 16)
            weights = (q[:, :4, one] @ k[..., one].transpose(1, 2) / 4).softmax(dim=-1)
            heads.append(weights @ v[..., one])
        x = x + block.attn.proj(torch.cat(heads, dim=-1))
        x = x + block.mlp(block.norm2(x))
    expected = selector.head(selector.norm(x[:, 0]))
    got = selector(sam.image_encoder, keys_of(sam.image_encoder, inputs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_pooled_embeddings_by_numpy() -> None:
    embeddings = torch.randn(3, 5, 4, 4)
    flat = embeddings.numpy().reshape(3, 5, 16)
    expected = np.concatenate([flat.mean(axis=2), flat.std(axis=2, ddof=1)], axis=1)
    np.testing.assert_allclose(pooled_embedding(embeddings).numpy(), expected, rtol=1e-5, atol=1e-6)


# Prompts as tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("with_mask", [False, True])
def test_further_tokens_are_sparse_embeddings(tiny: Backbone, with_mask: bool) -> None:
    """segment_anything's own decoder, given the tokens behind those of the prompt."""
    sam = tiny.sam
    torch.manual_seed(0)
    further = torch.randn(3, 7, 32)
    points = torch.rand(3, 2, 2) * 63
    labels = torch.tensor([[1, 0], [1, 1], [0, 1]])
    masks = torch.randn(3, *tiny.mask_shape) if with_mask else None
    with torch.no_grad():
        embeddings = sam.image_encoder(tiny.prepare(images_of(tiny, 3)))
        features = ImageFeatures({"embedding": embeddings})
        tokens = decode_tokens(sam, features, Prompts(points, labels, masks=masks), further)
        got = tokens.decode_masks()
        for k in range(3):
            sparse, dense = sam.prompt_encoder(
                points=(points[k : k + 1], labels[k : k + 1]),
                boxes=None,
                masks=None if masks is None else masks[k : k + 1, None],
            )
            expected, iou = sam.mask_decoder.predict_masks(
                image_embeddings=embeddings[k : k + 1],
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=torch.cat([sparse, further[k : k + 1]], dim=1),
                dense_prompt_embeddings=dense,
            )
            limit = 1e-4 * float(expected.std())
            torch.testing.assert_close(got[k], expected[0], rtol=0, atol=limit)
            torch.testing.assert_close(tokens.iou[k], iou[0], rtol=1e-4, atol=1e-4)


def queries(count: int, channels: int = 16) -> Tensor:
    return query_of(torch.randn(count, channels, 3, 3, generator=torch.Generator().manual_seed(0)))


def test_queries_have_length_one() -> None:
    torch.testing.assert_close(queries(4).norm(dim=1), torch.ones(4))


def test_l2p_trains_its_own_slice_and_picks_by_key() -> None:
    torch.manual_seed(0)
    pool, q = L2PPool(16, 3, size=12, length=2, top_k=3), queries(5)
    tokens, loss = pool(q, task=1)
    own = pool.prompts[3:6].reshape(1, 6, 16).expand(5, -1, -1)
    assert torch.equal(tokens, own)
    keys = pool.keys / pool.keys.norm(dim=1, keepdim=True)
    torch.testing.assert_close(loss, -(q @ keys[3:6].T).sum(dim=1).mean())
    (tokens.square().sum() + loss).backward()
    for weight in (pool.prompts, pool.keys):
        touched = weight.grad.flatten(1).abs().sum(dim=1) > 0  # type: ignore[union-attr]
        assert touched.nonzero()[:, 0].tolist() == [3, 4, 5]

    tokens, _ = pool(q)
    for k in range(5):
        nearest = np.argsort(-(q[k] @ keys.T).detach().numpy())[:3]
        assert torch.equal(tokens[k], pool.prompts[nearest.copy()].reshape(6, 16))
    assert len({tuple(t.flatten().tolist()) for t in tokens}) > 1


def test_l2p_has_a_slice_for_every_domain() -> None:
    pool = L2PPool(8, 10)
    tokens, _ = pool(queries(2, 8), task=9)
    assert tokens.shape == (2, 25, 8) and len(pool.prompts) == 50


def test_dualprompt_trains_its_own_expert_and_picks_by_key_among_those_seen() -> None:
    torch.manual_seed(0)
    pool, q = DualPromptPool(16, 4, general=2, expert=3), queries(40)
    for task in range(3):
        pool.begin_task(task)
    tokens, loss = pool(q, task=1)
    assert torch.equal(tokens[7], torch.cat([pool.general, pool.expert[1]]))
    (tokens.square().sum() + loss).backward()
    assert pool.general.grad is not None and pool.general.grad.abs().min() > 0
    for weight in (pool.expert, pool.keys):
        touched = weight.grad.flatten(1).abs().sum(dim=1) > 0  # type: ignore[union-attr]
        assert touched.tolist() == [False, True, False, False]

    tokens, _ = pool(q)
    keys = pool.keys / pool.keys.norm(dim=1, keepdim=True)
    best = (q @ keys[:3].T).argmax(dim=1)
    assert len(best.unique()) > 1
    for k, number in enumerate(best.tolist()):
        assert torch.equal(tokens[k], torch.cat([pool.general, pool.expert[number]]))
    with torch.no_grad():
        pool.keys[3] = 100 * q[0]  # of a domain that was not learned yet
    assert torch.equal(pool(q)[0], tokens)


def test_coda_leaves_components_of_earlier_domains_alone() -> None:
    torch.manual_seed(0)
    pool, q = CodaPool(16, 3, per_task=2, length=3), queries(5)
    for task in range(2):
        pool.begin_task(task)
    tokens, penalty = pool(q, task=1)
    prompts, keys, attention = pool.prompts[:4], pool.keys[:4], pool.attention[:4]
    expected = torch.zeros_like(tokens)
    for b in range(5):
        for m in range(4):
            weight = torch.cosine_similarity(q[b] * attention[m], keys[m], dim=0)
            expected[b] += weight * prompts[m]
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(pool(q)[0], expected)
    grams = [w.flatten(1) @ w.flatten(1).T for w in (prompts, keys, attention)]
    torch.testing.assert_close(
        penalty, sum((((gram - torch.eye(4)) ** 2).mean() for gram in grams), torch.zeros(()))
    )
    (tokens.square().sum() + penalty).backward()
    for name, weight in pool.named_parameters():
        touched = weight.grad.flatten(1).abs().sum(dim=1) > 0  # type: ignore[union-attr]
        assert touched.tolist() == [False, False, True, True, False, False], name


def test_a_prompted_sam_looks_at_the_frozen_embedding(tiny: Backbone) -> None:
    model = make_adapter(tiny, router="dualprompt").model(tiny.sam)
    assert isinstance(model, PromptedModel) and not trainable(model)
    pixels = tiny.prepare(images_of(tiny, 2))
    boxes = torch.tensor([[4.0, 4, 30, 40], [10, 20, 60, 60]])
    with torch.no_grad():
        features = model.encode(pixels)
        torch.testing.assert_close(features.embedding, tiny.sam.image_encoder(pixels))
        tokens, _ = model.pool(query_of(features.embedding))
        expected = decode_tokens(tiny.sam, features, Prompts(boxes=boxes), tokens)
        got = model.decode(features, Prompts(boxes=boxes))
    torch.testing.assert_close(got.decode_masks(), expected.decode_masks())


# Files -----------------------------------------------------------------------------------------

KINDS = [
    *((tune, "") for tune in TUNINGS.names()),
    ("decoder", "tokens"),
    ("lora_decoder", "embeddings"),
    *(("prompts", name) for name in POOLS),
]


@pytest.fixture
def named(
    tiny_checkpoint: str,
    build_tiny: Callable[[], Sam],
    add_backbone: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What `load_backbone` takes for the tiny SAM; nothing is loaded yet."""
    add_backbone("tiny", build=build_tiny)
    monkeypatch.setattr(loading, "_loaded", SharedObjects())
    return {"name": "tiny", "checkpoint": tiny_checkpoint, "device": "cpu"}


def test_weights_that_are_not_finite_are_refused(named: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_adapter(load_backbone(**named), "decoder", "")
    next(iter(adapter.experts[0].values())).view(-1)[0] = torch.nan
    path = adapter.save(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"nan\.safetensors: 1 of \d+ weights are NaN"):
        load_backbone(**named, adapter=str(path))


@pytest.mark.parametrize(("tune", "router"), KINDS, ids=["-".join(kind) for kind in KINDS])
def test_a_file_gives_the_adapter_back(
    named: dict[str, Any], tune: str, router: str, tmp_path: Path
) -> None:
    if tune.startswith("lora"):
        pytest.importorskip("peft")
    plain = load_backbone(**named)
    adapter = make_adapter(plain, tune, router)
    path = adapter.save(tmp_path / "a.safetensors")
    again = Adapter.load(path)
    assert replace(again, experts=[], weights={}) == replace(adapter, experts=[], weights={})
    assert again.state.keys() == adapter.state.keys()
    for name, value in adapter.state.items():
        assert torch.equal(again.state[name], value), name
    assert again.bytes == adapter.bytes == sum(v.nbytes for v in adapter.state.values())

    loaded = load_backbone(**named, adapter=str(path))
    assert loaded is load_backbone(**named, adapter=str(tmp_path / "." / "a.safetensors"))
    assert loaded is not plain and load_backbone(**named) is plain
    assert "adapted by by hand" in repr(loaded) and "adapted" not in repr(plain)
    images, boxes = images_of(plain, 2), torch.tensor([[4.0, 4, 30, 40], [10, 20, 60, 60]])
    expected = plain.with_model(adapter.model(plain.sam))
    features = loaded.encode(images)
    assert loaded.feature_spec == expected.feature_spec == features.spec
    assert loaded.embedding_shape == expected.embedding_shape == features.embedding.shape[1:]
    torch.testing.assert_close(features.tensors, expected.encode(images).tensors, rtol=0, atol=0)
    masks = loaded.decode(features, Prompts(boxes=boxes))[0]
    assert torch.equal(masks, expected.decode(features, Prompts(boxes=boxes))[0])
    before = plain.decode(plain.encode(images), Prompts(boxes=boxes))[0]
    assert (masks - before).abs().max() > 0.01 * before.std()


def test_identity_tells_adapters_apart(named: dict[str, Any], tmp_path: Path) -> None:
    plain = load_backbone(**named)
    adapter = make_adapter(plain)
    one, same = (adapter.save(tmp_path / f"{k}.safetensors") for k in "ab")
    moved = {name: value + 1e-6 for name, value in adapter.experts[0].items()}
    other = replace(adapter, experts=[moved]).save(tmp_path / "c.safetensors")
    ids = [load_backbone(**named, adapter=str(path)).identity for path in (one, same, other)]
    assert ids[0] == ids[1]
    assert len({plain.identity, *ids}) == 3
    # The same path, written anew.
    later = time.time_ns() + 10**9
    other.replace(one)
    os.utime(one, ns=(later, later))
    assert load_backbone(**named, adapter=str(one)).identity == ids[2]


def test_a_half_precision_backbone_takes_an_adapter(named: dict[str, Any], tmp_path: Path) -> None:
    plain = load_backbone(**named)
    for tune, router in (("decoder", "tokens"), ("prompts", "coda"), ("hq", "")):
        path = make_adapter(plain, tune, router).save(tmp_path / f"{tune}.safetensors")
        exact = load_backbone(**named, adapter=str(path))
        low = load_backbone(**named, dtype="bfloat16", adapter=str(path))
        images, boxes = images_of(plain, 2), torch.tensor([[4.0, 4, 30, 40], [10, 20, 60, 60]])
        got = low.decode(low.encode(images), Prompts(boxes=boxes))[0]
        expected = exact.decode(exact.encode(images), Prompts(boxes=boxes))[0]
        assert torch.corrcoef(torch.stack([got.ravel(), expected.ravel()]))[0, 1] > 0.95


def test_files_that_are_no_adapters_are_refused(named: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_adapter(load_backbone(**named))
    whole = adapter.save(tmp_path / "whole.safetensors").read_bytes()
    cases = {
        "truncated": (whole[: len(whole) // 2], "not a readable adapter file"),
        "empty": (b"", "not a readable adapter file"),
        "text": (b"hello, I am no adapter" * 9, "not a readable adapter file"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors: {message}"):
            load_backbone(**named, adapter=str(path))
    plain = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, plain)
    with pytest.raises(ValueError, match="weights.safetensors: not an adapter of this version"):
        load_backbone(**named, adapter=str(plain))
    save_file({"a": torch.zeros(2)}, plain, {"sam_gym_adapter": json.dumps({"version": 99})})
    with pytest.raises(ValueError, match="not an adapter of this version"):
        Adapter.load(plain)
    about = json.loads(
        safe_open(tmp_path / "whole.safetensors", "pt").metadata()["sam_gym_adapter"]
    )
    odd: list[tuple[dict[str, Any], str]] = [
        ({"num_experts": None}, "num_experts"),
        ({"num_experts": 10**12}, "num_experts is 1000000000000"),
        ({"num_experts": 0}, "expert0"),
        ({"num_experts": "2"}, "TypeError"),
        ({"later": 1}, "unexpected keyword argument 'later'"),
        ({"tune": None}, "missing 1 required positional argument: 'tune'"),
        ({"tune": 3}, "tune must be text, got 3"),
        ({"classes": "star"}, "classes must be a list, got 'star'"),
        ({"num_experts": 2}, "2 experts without a router"),
    ]
    for changes, message in odd:
        changed = {name: value for name, value in (about | changes).items() if value is not None}
        save_file(adapter.state, plain, {"sam_gym_adapter": json.dumps(changed)})
        with pytest.raises(ValueError, match=rf"weights.safetensors: not an adapter.*{message}"):
            Adapter.load(plain)
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors: no such adapter file"):
        load_backbone(**named, adapter=str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        load_backbone(**named, adapter=str(tmp_path))


def test_metadata_cannot_make_an_adapter_large(named: dict[str, Any], tmp_path: Path) -> None:
    backbone = load_backbone(**named)
    assert isinstance(backbone, Backbone)
    weights = expert(backbone.sam, "decoder", 1)
    adapter = Adapter("tiny", backbone.weights_digest, "naive", "decoder", ["one"], [weights])
    path = tmp_path / "adapter.safetensors"
    about = {"backbone": "tiny", "identity": "", "method": "", "tune": "decoder", "domains": []}
    metadata = about | {"version": 2, "num_experts": 10**12}
    save_file(weights, path, {"sam_gym_adapter": json.dumps(metadata)})
    with pytest.raises(ValueError, match="num_experts is 1000000000000"):
        Adapter.load(path)
    # The sizes of a module are compared before it is made.
    sizes: list[int] = []

    class Huge(torch.nn.Module):
        def __init__(self, channels: int, classes: list[str]) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(channels, len(classes)))
            if self.weight.device.type != "meta":
                sizes.append(self.weight.numel())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLASS_HEADS, "get", lambda name: Huge)
        adapter.classes, adapter.head = ["x"] * 1000, {"weight": torch.zeros(1, 1)}
        with pytest.raises(ValueError, match="does not fit"):
            adapter.model(backbone.sam)
    assert not sizes


def test_adapters_of_another_sam_are_refused(
    named: dict[str, Any], micro_checkpoint: str, tmp_path: Path
) -> None:
    plain = load_backbone(**named)
    adapter = make_adapter(plain)
    path = str(adapter.save(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="made for the backbone 'tiny', not 'micro'"):
        load_backbone("micro", micro_checkpoint, device="cpu", adapter=path)
    state = plain.sam.state_dict()
    name = "mask_decoder.iou_token.weight"
    other = tmp_path / "other.pth"
    torch.save(state | {name: state[name] + 1}, other)
    with pytest.raises(ValueError, match="for other weights of 'tiny' .* Pass the checkpoint"):
        load_backbone(**{**named, "checkpoint": str(other)}, adapter=path)


def test_adapters_of_the_first_micro_say_so(tmp_path: Path) -> None:
    first = load_backbone("micro-v0", device="cpu")
    adapter = replace(make_adapter(first), backbone="micro")  # its name then
    path = str(adapter.save(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="made for the backbone 'micro-v0', not 'micro': pass"):
        load_backbone("micro", device="cpu", adapter=path)
    assert load_backbone("micro-v0", device="cpu", adapter=path).adapter is not None


def test_what_does_not_fit_is_refused(named: dict[str, Any], tmp_path: Path) -> None:
    plain = load_backbone(**named)
    adapter = make_adapter(plain, "decoder", "tokens")
    path = adapter.save(tmp_path / "routed.safetensors")
    with pytest.raises(ValueError, match="routes among experts does not compile: compile=False"):
        load_backbone(**named, compile=True, adapter=str(path))
    misspelt = replace(adapter, tune="decodr").save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="Unknown tune target 'decodr'. Did you mean 'decoder'?"):
        load_backbone(**named, adapter=str(misspelt))
    lacking = {k: v for k, v in adapter.weights.items() if k != "head.bias"}
    with pytest.raises(ValueError, match="does not fit .* first: head.bias"):
        replace(adapter, weights=lacking).model(plain.sam)
    fewer = dict(list(adapter.experts[0].items())[1:])
    with pytest.raises(ValueError, match="^my file: does not fit"):
        replace(adapter, experts=[fewer], router="").model(plain.sam, "my file")


def test_one_expert_compiles_like_any_sam(named: dict[str, Any], tmp_path: Path) -> None:
    path = make_adapter(load_backbone(**named)).save(tmp_path / "a.safetensors")
    assert load_backbone(**named, compile=True, adapter=str(path)).compiled


def test_experts_share_what_is_frozen(tiny: Backbone) -> None:
    model = routed(tiny, "decoder")
    base = {weight.data_ptr() for weight in tiny.sam.parameters()}
    own = sum(w.nbytes for w in model.parameters() if w.data_ptr() not in base)
    assert own == 3 * sum(w.nbytes for w in tiny.sam.mask_decoder.parameters()) + sum(
        w.nbytes for w in model.router.parameters()
    )
    pytest.importorskip("peft")
    weights = expert(tiny.sam, "lora", 0)
    merged = {name.replace(".lora_A", ".weight") for name in weights if name.endswith(".lora_A")}
    for name, weight in apply_tuned(tiny.sam, "lora", weights).named_parameters():
        assert (weight.data_ptr() in base) == (name not in merged), name


# Environments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tune", "router"), [("decoder", "tokens"), ("prompts", "l2p")])
def test_environments_play_on_an_adapted_sam(
    tiny_env: dict[str, Any], tune: str, router: str, tmp_path: Path
) -> None:
    plain = load_backbone("tiny", tiny_env["checkpoint"], device="cpu")
    path = make_adapter(plain, tune, router).save(tmp_path / "a.safetensors")
    settings = {**tiny_env, "adapter": str(path), "max_steps": 4}
    vector = gym.make_vec(
        "SamSeg-v0", num_envs=3, vectorization_mode="vector_entry_point", **settings
    )
    scalars = [gym.make("SamSeg-v0", **settings) for _ in range(3)]
    base = gym.make("SamSeg-v0", **{**settings, "adapter": None})
    vector.action_space.seed(0)
    vector.reset(seed=5)
    for k, env in enumerate([*scalars, base]):
        env.reset(seed=5 + k % 3)
    differs = False
    for _ in range(3):
        actions = vector.action_space.sample()
        observation, reward, *_ = vector.step(actions)
        base_probability = base.step(actions[0])[0]["sam_pred_mask_prob"]
        for k, env in enumerate(scalars):
            alone, own_reward, *_ = env.step(actions[k])
            np.testing.assert_allclose(reward[k], own_reward, atol=5e-3)
            for name, value in alone.items():
                np.testing.assert_allclose(observation[name][k], value, atol=1e-3, err_msg=name)
            if k == 0:
                differs |= np.abs(alone["sam_pred_mask_prob"] - base_probability).max() > 0.01
    assert differs
    vector.close()


# Modules from outside --------------------------------------------------------------------------


class ConstantRouter(Router):
    """Sends every image to one expert, whose number it has learned."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.number = torch.nn.Parameter(torch.zeros(()))

    @classmethod
    def from_weights(cls, sam: Sam, weights: Any, num_experts: int) -> "ConstantRouter":
        return cls(num_experts)

    def logits(self, sam: Sam, pixels: Callable[[], Tensor], *_: Any) -> Tensor:
        chosen = self.number.round().long().expand(len(pixels()))
        return torch.eye(self.num_experts)[chosen]


def test_a_method_brings_its_own_module(named: dict[str, Any], tmp_path: Path) -> None:
    """Registered from outside the package; the adapter file names it."""
    plain = load_backbone(**named)
    adapter = replace(
        make_adapter(plain, "decoder", "tokens"),
        router="constant",
        weights={"number": torch.tensor(2.0)},
    )
    path = str(adapter.save(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="Unknown adapter module 'constant'"):
        load_backbone(**named, adapter=path)
    ADAPTER_MODULES.add("constant", ConstantRouter)
    try:
        loaded = load_backbone(**named, adapter=path)
    finally:
        del ADAPTER_MODULES._items["constant"]
    images, boxes = images_of(plain, 2), torch.tensor([[4.0, 4, 30, 40], [10, 20, 60, 60]])
    features = loaded.encode(images)
    assert features["route"].tolist() == [2, 2]
    alone = plain.with_model(Model(apply_tuned(plain.sam, "decoder", adapter.experts[2])))
    expected = alone.decode(alone.encode(images), Prompts(boxes=boxes))[0]
    torch.testing.assert_close(loaded.decode(features, Prompts(boxes=boxes))[0], expected)
