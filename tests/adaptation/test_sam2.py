"""Adaptation of a SAM 2: its frame has no padding, and its features are several tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptation.strategy import Strategy
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.model import Model
from sam_gym.data.streams import Stream
from sam_gym.utils.digest import digest_of


@pytest.fixture
def tiny_name(tiny_sam2: str) -> dict[str, Any]:
    """Trainers of these tests train the small SAM 2."""
    return {"name": tiny_sam2, "device": "cpu"}


@pytest.mark.parametrize(
    ("method", "tune"),
    [("naive", "decoder"), ("samcl", "lora"), ("dualprompt", "prompts")],
)
def test_what_is_saved_is_what_was_trained(
    method: str,
    tune: str,
    fitted: Callable[..., tuple[Any, Strategy]],
    pair: Stream,
    tiny_name: dict[str, Any],
    logits_of: Callable[[Backbone, Model], Tensor],
    tmp_path: Path,
) -> None:
    if tune == "lora":
        pytest.importorskip("peft")
    backbone = load_backbone(**tiny_name)
    digest = digest_of(backbone.sam.state_dict())
    _, strategy = fitted(pair, method, tune, steps=2)
    assert digest_of(backbone.sam.state_dict()) == digest
    path = strategy.adapter().save(tmp_path / "adapter.safetensors")
    adapted = load_backbone(**tiny_name, adapter=str(path))
    expected = logits_of(backbone, strategy.model())
    got = logits_of(backbone, adapted.model)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.std()))
    plain = logits_of(backbone, Model(backbone.sam))
    assert (expected - plain).abs().max() > 1e-4 * plain.std()


def test_moda_is_refused_before_work_starts(
    fitted: Callable[..., Any], pair: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "prepare", lambda *_: pytest.fail("images were encoded"))
    with pytest.raises(ValueError, match="Sam2Encoder differ in width.*or another method"):
        fitted(pair, "moda", "decoder")
