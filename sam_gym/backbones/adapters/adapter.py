"""Adapter files: learned weights that `load_backbone` applies to a SAM.

A file holds the tuned weights of one or several *experts* (copies of the SAM that share
frozen weights), the state of the module that routes or prompts by image, and that of a class head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from sam_gym.backbones.adapters.class_head import CLASS_HEADS
from sam_gym.backbones.adapters.model import ADAPTER_MODULES, Model
from sam_gym.backbones.adapters.tuning import TUNINGS, apply_tuned, bytes_of, check_names
from sam_gym.backbones.spec import renamed_backbone
from sam_gym.utils.settings import check_settings
from sam_gym.utils.weights import check_finite

#: Metadata key, and the versions that are read; the last is written.
_KEY, _VERSIONS = "sam_gym_adapter", (1, 2)
#: Fields of an `Adapter` that are metadata.
_METADATA = ("backbone", "identity", "method", "tune", "domains", "router", "classes", "head_type")
#: Name in files of version 1 -> name now, of metadata and of tensors' prefixes.
_RENAMED = {"chooser": "router"}


@dataclass
class Adapter:
    """The content of an adapter file.

    Attributes:
        backbone: name of the SAM that was adapted.
        identity: digest of its weights.
        method: name of the method that made it, for people.
        tune: a key of `TUNINGS`, or "prompts".
        domains: names of the domains, in the order of learning.
        experts: tuned weights of each expert (see `tuned_weights`); none where only prompts are
            trained.
        router: key of `ADAPTER_MODULES`, the module that routes or prompts by image; "" for none.
        weights: the state of that module.
        classes: names of the classes of the head; empty without one.
        head: the state of the class head.
        head_type: its key in `CLASS_HEADS`.
    """

    backbone: str
    identity: str
    method: str
    tune: str
    domains: list[str]
    experts: list[dict[str, Tensor]] = field(default_factory=list)
    router: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)
    head_type: str = "mlp"

    @property
    def state(self) -> dict[str, Tensor]:
        """All tensors, as the file names them."""
        tensors = {f"router.{name}": value for name, value in self.weights.items()}
        tensors |= {f"head.{name}": value for name, value in self.head.items()}
        for number, weights in enumerate(self.experts):
            tensors |= {f"expert{number}.{name}": value for name, value in weights.items()}
        return tensors

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return bytes_of(self.state.values())

    def check_fits(self, backbone: str, identity: str) -> None:
        """Raise `ValueError` unless the adapter was made for the SAM of this name and digest."""
        if identity == self.identity:
            return
        made_for = renamed_backbone(self.identity) or self.backbone
        if backbone != made_for:
            raise ValueError(
                f"The adapter was made for the backbone {made_for!r}, not {backbone!r}: pass "
                f"{made_for!r}."
            )
        raise ValueError(
            f"The adapter was made for other weights of {backbone!r} (digest {self.identity}, "
            f"here {identity}). Pass the checkpoint that it was trained on."
        )

    def save(self, path: Path) -> Path:
        """Write the file, whole or not at all."""
        from safetensors.torch import save

        from sam_gym.utils.files import write_atomic

        about = {name: getattr(self, name) for name in _METADATA}
        about |= {"version": _VERSIONS[-1], "num_experts": len(self.experts)}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state.items()}
        return write_atomic(path, save(tensors, metadata={_KEY: json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """Read an adapter file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or no adapter, or weights are not finite.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such adapter file.")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get(_KEY, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable adapter file ({error}).") from error
        check_finite(tensors, path)
        if not isinstance(about, dict) or about.get("version") not in _VERSIONS:
            raise ValueError(
                f"{path}: not an adapter of this version (python -m adaptation.train writes them)."
            )
        about = {_RENAMED.get(name, name): value for name, value in about.items()}
        about.pop("version")
        parts: dict[str, dict[str, Tensor]] = {"router": {}, "head": {}}
        try:
            count = about.pop("num_experts")
            if not 0 <= count <= len(tensors) + 1:
                raise ValueError(f"num_experts is {count}")
            names = [f"expert{number}" for number in range(count)]
            parts |= {name: {} for name in names}
            for name, value in tensors.items():
                part, _, own = name.partition(".")
                parts[_RENAMED.get(part, part)][own] = value
            experts = [parts[name] for name in names]
            adapter = cls(**about, experts=experts, weights=parts["router"], head=parts["head"])
            check_settings(adapter)
            if not adapter.router and count != 1:
                raise ValueError(f"{count} experts without a router")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: not an adapter that python -m adaptation.train has written "
                f"({type(error).__name__}: {error})."
            ) from error
        return adapter

    def model(self, sam: Sam, source: str = "adapter") -> Model:
        """Build the adapted model: frozen, sharing with `sam` everything that was not tuned.

        Args:
            sam: the pretrained SAM.
            source: the file, for messages.

        Raises:
            ValueError: the adapter was made for another SAM, or names an unknown module.
        """
        experts = [apply_tuned(sam, self.tune, weights, source) for weights in self.experts]
        raw = TUNINGS.get(self.tune).raw if experts else "embedding"
        if self.router:
            make = ADAPTER_MODULES.get(self.router).from_weights
            try:
                module = _loaded(
                    lambda: make(sam, self.weights, len(experts)), self.weights, source
                )
            except (KeyError, IndexError, RuntimeError) as error:
                raise ValueError(
                    f"{source}: its weights are not those of the router {self.router!r} "
                    f"({type(error).__name__}: {error})."
                ) from error
            model = module.wrap(sam, experts, raw)
        else:
            model = Model(experts[0], raw)
        if self.classes:
            make_head = CLASS_HEADS.get(self.head_type)
            channels = sam.prompt_encoder.embed_dim
            model.head = _loaded(lambda: make_head(channels, self.classes), self.head, source)
        return model.to(next(sam.parameters()).device).eval()


def _loaded(make: Callable[[], Any], weights: Mapping[str, Tensor], source: str) -> Any:
    """Make a module and load its weights, once its sizes are known to be theirs."""
    with torch.device("meta"):
        check_names(make().state_dict(), weights, source)
    module = make()
    module.load_state_dict(weights)
    return module.requires_grad_(False)
