"""Adapter files: learned weights that `load_backbone` applies to a SAM.

A file holds the tuned weights of one or several *experts* (copies of the SAM that share
frozen weights), the state of the module that routes or prompts by image, that of a class head, and
that of a semantic head.
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
from sam_gym.backbones.adapters.model import ADAPTER_MODULES, Model, raw_spec
from sam_gym.backbones.adapters.semantic_head import SEMANTIC_HEADS
from sam_gym.backbones.adapters.tuning import (
    apply_tuned,
    bytes_of,
    check_names,
    put_weights,
    raw_kind,
)
from sam_gym.backbones.spec import renamed_backbone
from sam_gym.backbones.timm_features import split_kind, timm_encoder
from sam_gym.utils.settings import check_settings
from sam_gym.utils.weights import check_finite

#: Metadata key, and the versions that are read; of the last are files with a semantic head.
_KEY, _VERSIONS = "sam_gym_adapter", (1, 2, 3)
#: Fields of an `Adapter` that are metadata.
_METADATA = ("backbone", "identity", "method", "tune", "domains", "router", "classes", "head_type")
#: Those of a semantic head, in files of version 3 only.
_SEMANTIC = ("semantic_type", "semantic_features", "semantic_classes", "semantic_encoder")
#: Classes of the SAM-Cityscapes code, in the order of its configuration.
_SEED_CLASSES = ("road", "sidewalk", "building", "person", "car")
#: Name in files of version 1 -> name now, of metadata and of tensors' prefixes.
_RENAMED = {"chooser": "router"}


@dataclass
class Adapter:
    """The content of an adapter file.

    Attributes:
        backbone: name of the SAM that was adapted.
        identity: digest of its weights; "" if it is not known.
        method: name of the method that made it, for people.
        tune: a key of `TUNINGS`, `VIDEO`, or "prompts" or "head" where no part of the SAM is tuned.
        domains: names of the domains, in the order of learning.
        experts: tuned weights of each expert (see `tuned_weights`); none where only prompts or a
            semantic head are trained.
        router: key of `ADAPTER_MODULES`, the module that routes or prompts by image; "" for none.
        weights: the state of that module.
        classes: names of the classes of the head; empty without one.
        head: the state of the class head.
        head_type: its key in `CLASS_HEADS`.
        semantic_type: key in `SEMANTIC_HEADS` of the semantic head; "" without one.
        semantic_features: kind of `raw_features` that it takes.
        semantic_classes: names of its classes.
        semantic_encoder: digest of the model of timm that computes these features; "" for those of
            the SAM.
        semantic: its state.
        memory: tuned weights of the video memory, by name.
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
    semantic_type: str = ""
    semantic_features: str = ""
    semantic_classes: list[str] = field(default_factory=list)
    semantic_encoder: str = ""
    semantic: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Tensor]:
        """All tensors, as the file names them."""
        tensors = {f"router.{name}": value for name, value in self.weights.items()}
        tensors |= {f"head.{name}": value for name, value in self.head.items()}
        tensors |= {f"semantic.{name}": value for name, value in self.semantic.items()}
        tensors |= {f"memory.{name}": value for name, value in self.memory.items()}
        for number, weights in enumerate(self.experts):
            tensors |= {f"expert{number}.{name}": value for name, value in weights.items()}
        return tensors

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return bytes_of(self.state.values())

    def check_fits(self, backbone: str, identity: str) -> None:
        """Raise `ValueError` unless the adapter was made for the SAM of this name and digest."""
        if self.identity in ("", identity):
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

        version = _VERSIONS[-1] if self.semantic_type else _VERSIONS[-2]
        names = (*_METADATA, *(_SEMANTIC if self.semantic_type else ()))
        about = {name: getattr(self, name) for name in names}
        about |= {"version": version, "num_experts": len(self.experts)}
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
        parts: dict[str, dict[str, Tensor]] = {
            name: {} for name in ("router", "head", "semantic", "memory")
        }
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
            adapter = cls(
                **about,
                experts=experts,
                weights=parts["router"],
                head=parts["head"],
                semantic=parts["semantic"],
                memory=parts["memory"],
            )
            check_settings(adapter)
            least = 0 if adapter.semantic_type else 1
            if not adapter.router and not least <= count <= 1:
                raise ValueError(f"{count} experts without a router")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: not an adapter that python -m adaptation.train has written "
                f"({type(error).__name__}: {error})."
            ) from error
        return adapter

    @classmethod
    def of_seed_head(cls, state: Mapping[str, Tensor], source: object) -> Adapter:
        """Make the adapter of a head that the SAM-Cityscapes code has trained.

        Its file names neither a SAM nor classes: the adapter fits every SAM with an embedding of
        that width, and five classes are those of the code's configuration.

        Args:
            state: the state dict of `seg_head_epoch_N.pth`.
            source: the file, for messages.

        Raises:
            ValueError: it is the state of something else, or weights are not finite.
        """
        check_finite(state, source)
        last = state.get("net.6.weight")
        if last is None or not all(name.startswith("net.") for name in state):
            raise ValueError(
                f"{source}: not a head of the SAM-Cityscapes code (seg_head_epoch_N.pth), whose "
                "weights are net.0.weight to net.6.bias. Adapters of python -m adaptation.train "
                "are .safetensors files."
            )
        count = len(last)
        known = count == len(_SEED_CLASSES)
        return cls(
            backbone="",
            identity="",
            method="semantic",
            tune="head",
            domains=["cityscapes"],
            semantic_type="seed",
            semantic_features="embedding",
            semantic_classes=[*_SEED_CLASSES] if known else [f"class{k}" for k in range(count)],
            semantic=dict(state),
        )

    def tune_memory(self, memory: Any, source: str = "adapter") -> None:
        """Put the tuned weights into a video memory.

        Raises:
            ValueError: there is no memory, or the weights do not fit it.
        """
        if not self.memory:
            return
        if memory is None:
            raise ValueError(
                f"{source}: holds weights of a video memory, and this backbone has none."
            )
        put_weights(memory, self.memory, source)

    def _check_encoder(self, sam: Sam, source: str) -> None:
        """Raise `ValueError` unless timm has the weights that the semantic head was trained on."""
        _, name = split_kind(self.semantic_features)
        if name and timm_encoder(sam, name).identity != self.semantic_encoder:
            raise ValueError(
                f"{source}: its semantic head was trained on other weights of timm's {name!r} "
                f"(digest {self.semantic_encoder}). Pass the folder that had them, or train again."
            )

    def model(self, sam: Sam, source: str = "adapter") -> Model:
        """Build the adapted model: frozen, sharing with `sam` everything that was not tuned.

        Args:
            sam: the pretrained SAM.
            source: the file, for messages.

        Raises:
            ValueError: the adapter was made for another SAM or other weights of a model of timm, or
                names an unknown module.
            ConnectionError: the weights of a model of timm cannot be downloaded.
        """
        experts = [apply_tuned(sam, self.tune, weights, source) for weights in self.experts]
        raw = raw_kind(self.tune) if experts else "embedding"
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
            model = Model(experts[0] if experts else sam, raw)
        if self.classes:
            make_head = CLASS_HEADS.get(self.head_type)
            channels = sam.prompt_encoder.embed_dim
            model.head = _loaded(lambda: make_head(channels, self.classes), self.head, source)
        if self.semantic_type:
            make_semantic, kind = SEMANTIC_HEADS.get(self.semantic_type), self.semantic_features
            self._check_encoder(sam, source)
            model.segmenter = _loaded(
                lambda: make_semantic(kind, raw_spec(sam, kind), self.semantic_classes),
                self.semantic,
                source,
            )
        return model.to(next(sam.parameters()).device).eval()


def _loaded(make: Callable[[], Any], weights: Mapping[str, Tensor], source: str) -> Any:
    """Make a module and load its weights, once its sizes are known to be theirs."""
    with torch.device("meta"):
        check_names(make().state_dict(), weights, source)
    module = make()
    module.load_state_dict(weights)
    return module.requires_grad_(False)
