"""The methods: what each adds to the loss, keeps of past domains, and leaves alone."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import adaptation.strategies  # noqa: F401  (registers the methods)
from adaptation.features import FeatureBank
from adaptation.losses import mask_costs, mask_loss
from adaptation.objects import ObjectIndices
from adaptation.steps import Learner, make_batch
from adaptation.strategies.er import buffered
from adaptation.strategy import STRATEGIES, Batch, Strategy, StrategyContext, check_hooks
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.model import Model, embed
from sam_gym.backbones.adapters.routers import RoutedModel
from sam_gym.backbones.adapters.tuning import TUNINGS, trainable, tuned_weights
from sam_gym.backbones.decode import MaskTokens, decode_tokens
from sam_gym.data.streams import Stream
from sam_gym.utils.digest import digest_of

#: Few steps of everything.
FEW = {"selector_steps": 4, "fisher_samples": 5, "buffer_images": 2, "buffer_embeddings": 3}
Fitted = Callable[..., tuple[Any, Strategy]]
#: Every method, every tune target, and mixtures of what is kept with what is shared.
PAIRS = [
    *((name, cls.default_tune) for name, cls in STRATEGIES.items() if cls.evaluations is None),
    *(("naive", tune) for tune in TUNINGS.names() if tune != "decoder"),
    *(("moda", "hq"), ("lwf", "lora"), ("ewc", "sam_adapter"), ("samcl", "lora")),
]


def needed(tune: str) -> None:
    if tune.startswith("lora"):
        pytest.importorskip("peft")


def make(bank: FeatureBank, method: str, tune: str | None = None, **options: Any) -> Strategy:
    cls = STRATEGIES.get(method)
    names = {field.name for field in fields(cls.Options)}
    few = {name: value for name, value in FEW.items() if name in names} | options
    return cls(StrategyContext(bank, tune or cls.default_tune, cls.Options(**few)))


def batch_of(
    bank: FeatureBank, task: int, seed: int = 0, count: int = 6, raw: str = "embedding"
) -> Batch:
    rng = np.random.default_rng(seed)
    draw = ObjectIndices.draw(rng, count, [bank.pool(task)])
    return make_batch(bank, draw, raw, rng.integers(2**63, size=count))


def train(strategy: Strategy, bank: FeatureBank, task: int, steps: int = 3) -> None:
    """A plain loop: the trainer's, without all that it does beside."""
    strategy.before_task(task)
    learner = Learner(strategy)
    optimizer = torch.optim.SGD(list(strategy.trained().values()), 0.02)
    for step in range(steps):
        batch = batch_of(bank, task, step, raw=strategy.raw)
        loss, _ = learner(lambda batch=batch: batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# The loss --------------------------------------------------------------------------------------


def test_mask_costs_by_hand() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 2, (2, 3, 4, 4)), rng.random((2, 4, 4))
    valid = (rng.random((2, 4, 4)) < 0.7).astype(float)
    got = mask_costs(*(torch.from_numpy(a) for a in (logits, targets, valid)))
    for i in range(2):
        for m in range(3):
            p, t = 1 / (1 + np.exp(-logits[i, m])), targets[i]
            entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p))
            w = valid[i]
            dice = 1 - (2 * (p * t * w).sum() + 1) / ((p * w).sum() + (t * w).sum() + 1)
            expected = (entropy * w).sum() / w.sum() + dice
            assert float(got[i, m]) == pytest.approx(expected, rel=1e-9)


def test_an_ambiguous_prompt_teaches_the_best_of_three() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(4, 4, 8, requires_grad=True)
    iou = torch.rand(4, 4, requires_grad=True)
    tokens = MaskTokens(vectors, torch.randn(4, 4, 16, 8), iou, (2, 2))
    targets = (torch.rand(4, 8, 8) > 0.5).float()
    ambiguous = torch.tensor([True, False, True, False])
    result = mask_loss(tokens, targets, torch.ones(4, 8, 8), ambiguous)
    drawn = tokens.decode_masks(vectors)
    costs = mask_costs(drawn, targets, torch.ones(4, 8, 8)).detach().numpy()
    expected = [1 + costs[k, 1:].argmin() if ambiguous[k] else 0 for k in range(4)]
    assert result.chosen.tolist() == expected
    result.total.backward()
    assert vectors.grad is not None and iou.grad is not None
    taught = vectors.grad.abs().sum(dim=2) > 0
    for k in range(4):
        assert taught[k].nonzero()[:, 0].tolist() == [expected[k]]
        # Every mask that the prompt allows learns how good it is.
        allowed = [1, 2, 3] if ambiguous[k] else [0]
        assert (iou.grad[k] != 0).nonzero()[:, 0].tolist() == allowed
        hits, truth = (drawn[k] > 0).numpy(), (targets[k] > 0).numpy()
        overlap = [(h & truth).sum() / (h | truth).sum() for h in hits]
        assert float(result.ious[k]) == pytest.approx(overlap[expected[k]])
        for m in allowed:
            slope = 2 * (float(iou[k, m].detach()) - overlap[m]) / len(allowed) / 4
            assert float(iou.grad[k, m]) == pytest.approx(slope, abs=1e-6)


# EWC -------------------------------------------------------------------------------------------


def test_fisher_is_the_mean_of_squared_gradients_of_single_objects(bank: FeatureBank) -> None:
    strategy: Any = make(bank, "ewc")
    train(strategy, bank, 0)
    before = {name: weight.detach().clone() for name, weight in strategy.trained().items()}
    strategy.after_task(0)
    rng = np.random.default_rng([0, 13, 0])
    draw = ObjectIndices.draw(rng, 5, [bank.pool(0)])
    seeds = rng.integers(2**63, size=5)
    expected = {name: torch.zeros_like(weight) for name, weight in before.items()}
    for k in range(5):
        one = ObjectIndices(draw.domains[k : k + 1], draw.objects[k : k + 1])
        batch = make_batch(bank, one, "embedding", seeds[k : k + 1])
        strategy.sam.zero_grad()
        tokens = decode_tokens(strategy.sam, batch.raw, batch.prompts)
        mask_loss(tokens, batch.targets, batch.valid, batch.ambiguous).total.backward()
        for name, weight in strategy.trained().items():
            if weight.grad is not None:
                expected[name] += weight.grad**2 / 5
    strategy.sam.zero_grad()
    assert sum(float(f.sum()) for f in expected.values()) > 0
    for name, weight in strategy.trained().items():
        torch.testing.assert_close(strategy._fisher[name], expected[name], rtol=1e-4, atol=1e-9)
        assert torch.equal(weight, before[name])


def test_the_penalty_pulls_to_the_weights_after_each_domain(bank: FeatureBank) -> None:
    strategy: Any = make(bank, "ewc", weight=7.0)
    anchors, fishers, total = [], [], None
    for task in range(2):
        train(strategy, bank, task)
        anchors.append({n: w.detach().clone() for n, w in strategy.trained().items()})
        strategy.after_task(task)
        total, before = {n: f.clone() for n, f in strategy._fisher.items()}, total
        fishers.append(total if before is None else {n: total[n] - before[n] for n in total})
    strategy.before_task(2)
    with torch.no_grad():
        for weight in strategy.trained().values():
            weight += 0.05 * torch.randn_like(weight)
    weights = strategy.trained()
    batch: Any = None
    got = torch.autograd.grad(strategy.loss(batch, batch), list(weights.values()))
    parts = [
        7.0 * (fisher[name] * (weight - anchor[name]) ** 2).sum()
        for fisher, anchor in zip(fishers, anchors, strict=True)
        for name, weight in weights.items()
    ]
    expected = torch.autograd.grad(torch.stack(parts).sum(), list(weights.values()))
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-6
    for name, one, other in zip(weights, got, expected, strict=True):
        limit = 1e-3 * float(other.abs().max()) + 1e-9
        torch.testing.assert_close(one, other, rtol=0, atol=limit, msg=name)


def test_nothing_is_held_in_the_first_domain(bank: FeatureBank) -> None:
    nothing: Any = None
    for method in ("ewc", "lwf", "naive", "er"):
        strategy = make(bank, method)
        strategy.before_task(0)
        assert strategy.loss(nothing, nothing) == 0.0
        assert strategy.replayed() == []


# LwF -------------------------------------------------------------------------------------------


def test_lwf_distils_the_masks_of_before(bank: FeatureBank) -> None:
    strategy: Any = make(bank, "lwf", weight=2.0)
    train(strategy, bank, 0)
    before = copy.deepcopy(strategy.sam)
    train(strategy, bank, 1)
    batch = batch_of(bank, 1, 9)

    def tokens_of(sam: Any) -> MaskTokens:
        return decode_tokens(sam, batch.raw, batch.prompts)

    tokens = tokens_of(strategy.sam)
    masks = mask_loss(tokens, batch.targets, batch.valid, batch.ambiguous)
    assert masks.chosen.max() > 0
    with torch.no_grad():
        taught = tokens_of(before)
        probabilities = taught.decode_masks().sigmoid()
    expected = torch.zeros(())
    for k, chosen in enumerate(masks.chosen.tolist()):
        t, w, z = probabilities[k, chosen], batch.valid[k], masks.logits[k]
        entropy = (F.binary_cross_entropy_with_logits(z, t, reduction="none") * w).sum() / w.sum()
        p = z.sigmoid() * w
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + (t * w).sum() + 1)
        expected = expected + 2.0 * (entropy + dice) / len(masks.chosen)
    loss = strategy.loss(batch, masks)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not any(w.requires_grad for w in strategy._teacher.parameters())
    assert any(w.grad is not None and w.grad.any() for w in strategy.trained().values())


def test_a_student_who_says_the_same_is_not_moved(bank: FeatureBank) -> None:
    """Cross-entropy is stationary at equal soft masks; Dice is where masks are certain."""
    torch.manual_seed(0)
    targets, valid = torch.rand(2, 8, 8), torch.ones(2, 8, 8)
    logits = torch.logit(targets).requires_grad_()
    entropy = F.binary_cross_entropy_with_logits(logits, targets)
    assert float(torch.autograd.grad(entropy, logits)[0].abs().max()) < 1e-7
    certain = (40 * (targets > 0.5) - 20.0).requires_grad_()
    costs = mask_costs(certain[:, None], certain.detach().sigmoid(), valid).sum()
    assert float(torch.autograd.grad(costs, certain)[0].abs().max()) < 1e-6


# Replay ----------------------------------------------------------------------------------------


def test_replay_is_of_images_in_the_buffers_of_past_domains(
    loaded: Backbone, stream: Stream
) -> None:
    bank = FeatureBank(loaded, stream, augmentations=3, objects_per_image=3)
    strategy = make(bank, "er")
    strategy.before_task(2)
    draw = ObjectIndices.draw(np.random.default_rng(0), 300, strategy.replayed())
    assert set(draw.domains) == {0, 1}
    for task in (0, 1):
        views = bank.train(stream[task])
        shown = views.image[views.rows[draw.objects[draw.domains == task]]]
        kept = buffered(bank, 0, [task], 2)[0].allowed
        assert set(shown) == set(views.image[kept])
        assert len(set(shown)) == 2
        # All views of an image that is kept, and of no other.
        assert set(kept) == set(np.flatnonzero(np.isin(views.image, views.image[kept])))
    assert 120 < (draw.domains == 0).sum() < 180
    pairs = zip(buffered(bank, 5, range(3), 2), buffered(bank, 0, range(3), 2), strict=True)
    assert any(set(a.allowed) != set(b.allowed) for a, b in pairs)


# Merging ---------------------------------------------------------------------------------------


def merged_changes(strategy: Strategy) -> dict[str, Tensor]:
    weights = strategy.adapter().experts[0]
    names = {name.rpartition(".")[0] for name in weights}
    return {n: (weights[f"{n}.lora_B"] @ weights[f"{n}.lora_A"]).double() for n in names}


def root_of(gram: Tensor) -> np.ndarray:
    """Rows whose Gram matrix is that of a layer's inputs, with RegMean's shrinkage."""
    shrunk = 0.9 * gram.numpy() + 0.1 * np.diag(gram.diagonal().numpy())
    levels, vectors = np.linalg.eigh(shrunk)
    return np.sqrt(levels.clip(0))[:, None] * vectors.T


def test_merging_one_domain_gives_its_change(bank: FeatureBank) -> None:
    """What the layer adds is the same on what it is given; some inputs are always zero."""
    pytest.importorskip("peft")
    strategy: Any = make(bank, "regcl")
    train(strategy, bank, 0)
    grams = strategy._input_grams(0)
    strategy.after_task(0)
    merged, changes = merged_changes(strategy), strategy._changes()
    assert merged.keys() == changes.keys()
    for name, change in changes.items():
        rows = root_of(grams[name])
        expected = rows @ change.numpy().T
        off = np.linalg.norm(rows @ merged[name].numpy().T - expected)
        assert off <= 1e-2 * np.linalg.norm(expected), name


def test_merging_two_domains_is_least_squares(bank: FeatureBank) -> None:
    """Layer by layer, against numpy's solution of the squares written out as rows."""
    pytest.importorskip("peft")
    strategy: Any = make(bank, "regcl")
    grams, changes = [], []
    for task in range(2):
        train(strategy, bank, task)
        grams.append(strategy._input_grams(task))
        changes.append(strategy._changes())
        strategy.after_task(task)
    merged = merged_changes(strategy)
    better = 0
    for name in merged:
        parts = [root_of(gram[name]) for gram in grams]
        added = [part @ change[name].numpy().T for part, change in zip(parts, changes, strict=True)]
        rows, values = np.concatenate(parts), np.concatenate(added)
        best = np.linalg.lstsq(rows, values, rcond=None)[0]
        average = (changes[0][name] + changes[1][name]).numpy().T / 2
        least, got, plain = (
            np.linalg.norm(rows @ change - values)
            for change in (best, merged[name].numpy().T, average)
        )
        assert got <= 1.01 * least + 1e-3 * np.linalg.norm(values), name
        better += got < 0.98 * plain
    assert better > len(merged) / 2


def test_grams_are_of_the_inputs(bank: FeatureBank) -> None:
    pytest.importorskip("peft")
    strategy: Any = make(bank, "regcl")
    strategy.before_task(0)
    name = "mask_decoder.output_hypernetworks_mlps.0.layers.0"
    seen: list[Tensor] = []
    layer = strategy.sam.get_submodule(name)
    hook = layer.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, -2)))
    gram = strategy._input_grams(0)[name]
    hook.remove()
    rows = torch.cat(seen).double()
    torch.testing.assert_close(gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    assert not layer._forward_pre_hooks


# Every method ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "tune"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_every_method(
    method: str,
    tune: str,
    fitted: Fitted,
    loaded: Backbone,
    pair: Stream,
    tiny_name: dict[str, Any],
    logits_of: Callable[[Backbone, Model], Tensor],
    tmp_path: Any,
) -> None:
    """What is shared stays as it is; what is saved is what was trained."""
    needed(tune)
    digest = digest_of(loaded.sam.state_dict())
    flags = [(m.training, len(m._forward_pre_hooks)) for m in loaded.sam.modules()]
    run, strategy = fitted(pair, method, tune, steps=2)
    assert digest_of(loaded.sam.state_dict()) == digest and not trainable(loaded.sam)
    assert [(m.training, len(m._forward_pre_hooks)) for m in loaded.sam.modules()] == flags
    assert all(weight.grad is None for weight in loaded.sam.parameters())

    stages = 1 if method in ("joint", "zero_shot") else 2
    assert (run.method, run.tune, run.domains) == (method, tune, pair.names)
    for measure in ("iou", "biou"):
        matrix = np.array(run.scores["box"][measure])
        assert matrix.shape == (stages, 2) and np.isfinite(matrix).all()
        assert (matrix >= 0).all() and (matrix <= 100).all()
    if method == "zero_shot":
        assert run.scores["box"]["iou"][0] == run.zero_shot["box"]["iou"]
        with pytest.raises(ValueError, match="learns nothing, so there is no adapter"):
            strategy.adapter()
        return
    assert run.trainable == sum(w.numel() for w in strategy.trained().values()) > 0
    assert (run.routed is not None) == (method in ("moda", "samcl"))

    path = strategy.adapter().save(tmp_path / "a.safetensors")
    adapted = load_backbone(**tiny_name, adapter=str(path))
    assert adapted.adapter is not None and adapted.adapter.domains == list(pair.names)
    assert (adapted.adapter.method, adapted.adapter.tune) == (method, tune)
    expected = logits_of(loaded, strategy.model())
    got = logits_of(loaded, adapted.model)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.std()))
    plain = logits_of(loaded, Model(loaded.sam))
    assert (expected - plain).abs().max() > 1e-4 * plain.std()


@pytest.mark.parametrize("method", ["moda", "samcl"])
def test_every_expert_starts_from_the_sam_as_it_was(
    bank: FeatureBank, method: str, logits_of: Callable[[Backbone, Model], Tensor]
) -> None:
    needed(STRATEGIES.get(method).default_tune)
    strategy: Any = make(bank, method)
    train(strategy, bank, 0, steps=2)
    strategy.after_task(0)
    strategy.before_task(1)
    untrained = TUNINGS.get(strategy.context.tune).prepare(bank.backbone.sam)
    base = logits_of(bank.backbone, Model(untrained))
    fresh = logits_of(bank.backbone, Model(strategy.sam))
    torch.testing.assert_close(fresh, base, rtol=0, atol=1e-4 * float(base.std()))
    train(strategy, bank, 1, steps=2)
    first = copy.deepcopy(strategy._experts[0])
    strategy.after_task(1)
    model = strategy.model()
    assert isinstance(model, RoutedModel) and len(model.experts) == 2
    for name, value in first.items():
        assert torch.equal(strategy._experts[0][name], value)
    alone = logits_of(bank.backbone, Model(model.experts[1]))  # type: ignore[arg-type]
    # SAMCL keeps its experts in half precision.
    near = {"moda": 1e-4, "samcl": 1e-2}[method] * float(base.std())
    expected = logits_of(bank.backbone, Model(strategy.sam))
    torch.testing.assert_close(alone, expected, rtol=0, atol=near)


@pytest.mark.parametrize("method", ["moda", "samcl"])
def test_selectors_learn_to_tell_domains_apart(bank: FeatureBank, method: str) -> None:
    needed(STRATEGIES.get(method).default_tune)
    strategy: Any = make(
        bank,
        method,
        selector_steps=120,
        **{"moda": {"buffer_images": 4}, "samcl": {"buffer_embeddings": 4}}[method],
    )
    for task in range(2):
        train(strategy, bank, task, steps=1)
        strategy.after_task(task)
    model = strategy.model()
    with torch.no_grad():
        for task, domain in enumerate(bank.stream):
            pixels = bank.pixels(domain, "train", bank.train(domain).firsts)
            assert (model.encode(pixels)["route"] == task).all()


@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda"])
def test_prompt_methods_train_nothing_but_their_pool(bank: FeatureBank, method: str) -> None:
    strategy: Any = make(bank, method)
    train(strategy, bank, 0)
    pool = {name: weight.detach().clone() for name, weight in strategy.module.named_parameters()}
    assert set(strategy.trained()) == set(pool)
    train(strategy, bank, 1)
    moved = {
        name for name, w in strategy.module.named_parameters() if not torch.equal(w, pool[name])
    }
    assert {"coda": {"prompts", "keys", "attention"}, "l2p": {"prompts", "keys"}}.get(
        method, {"general", "expert", "keys"}
    ) == moved
    # What belongs to the first domain was left alone.
    own = {"coda": ("prompts", 10), "l2p": ("prompts", 5), "dualprompt": ("expert", 1)}
    name, size = own[method]
    assert torch.equal(dict(strategy.module.named_parameters())[name][:size], pool[name][:size])
    assert strategy.model().task is None


def test_a_state_gives_everything_back(bank: FeatureBank) -> None:
    for method in ("naive", "ewc", "lwf", "moda", "coda", "samcl", "regcl"):
        needed(STRATEGIES.get(method).default_tune)
        first = make(bank, method)
        train(first, bank, 0, steps=2)
        first.after_task(0)
        first.before_task(1)
        again = make(bank, method)
        again.set_state(copy.deepcopy(first.state()))
        batch = batch_of(bank, 1, raw=first.raw)
        losses = [
            Learner(strategy)(lambda batch=batch: batch)[0].detach() for strategy in (first, again)
        ]
        assert torch.equal(losses[0], losses[1]), method
        for one, other in zip(
            first.adapter().state.items(), again.adapter().state.items(), strict=True
        ):
            assert one[0] == other[0] and torch.equal(one[1], other[1]), method
        assert first.kept_bytes() == again.kept_bytes() > 0


def test_bytes_that_are_kept(bank: FeatureBank) -> None:
    weights = sum(w.nbytes for w in tuned_weights(make(bank, "naive").sam).values())
    image = 3 * 64 * 64
    kept = {}
    for method in ("naive", "er", "ewc"):
        strategy = make(bank, method)
        strategy.before_task(1)
        kept[method] = strategy.kept_bytes()
    assert kept["naive"] == weights and kept["ewc"] == 3 * weights
    assert kept["er"] == weights + 2 * 2 * image


# Hooks and names -------------------------------------------------------------------------------


def test_a_misspelt_hook_is_an_error() -> None:
    register = STRATEGIES.register("slip")
    with pytest.raises(
        TypeError, match=r"Slip.before_tsk is no hook .* Did you mean 'before_task'"
    ):
        register(type("Slip", (Strategy,), {"before_tsk": lambda self, task: None}))
    with pytest.raises(TypeError, match="Hooks: raw, learning_rate, module, epochs"):
        register(type("Slip", (Strategy,), {"something": 1}))
    assert "slip" not in STRATEGIES.names()
    check_hooks(type("Fine", (Strategy,), {"_own": 1, "after_step": lambda self, step: None}))


def test_methods_and_targets_that_do_not_go_together(bank: FeatureBank) -> None:
    with pytest.raises(ValueError, match="Unknown method 'mda'. Did you mean 'moda'"):
        STRATEGIES.get("mda")
    for method, tune in (("l2p", "decoder"), ("regcl", "hq"), ("naive", "prompts")):
        with pytest.raises(ValueError, match="Unknown tune target of"):
            make(bank, method, tune)


def test_raw_features_are_enough(bank: FeatureBank) -> None:
    """What is decoded in training is what the adapted SAM would decode."""
    for tune in TUNINGS.names():
        needed(tune)
        strategy = make(bank, "naive", tune)
        batch = batch_of(bank, 0, raw=strategy.raw)
        with torch.no_grad():
            tokens = strategy.decode(batch)
            model = strategy.model()
            other = model.decode(embed(strategy.sam, batch.raw), batch.prompts)
        torch.testing.assert_close(tokens.decode_masks(), other.decode_masks())
