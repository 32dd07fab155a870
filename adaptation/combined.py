"""Combine methods: `STRATEGIES.get("ewc+er")`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from adaptation.features import Pool
from adaptation.losses import MaskLoss
from adaptation.strategy import STRATEGIES, Batch, Strategy, StrategyContext
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.utils.registry import unknown_name

#: Hooks whose results cannot be added up: at most one of the combined methods may override them.
_EXCLUSIVE = (
    *("raw", "learning_rate", "module", "make_optimizer"),
    *("batch", "decode", "masks", "model", "adapter"),
)
#: Hooks of methods that do not train on prompted objects, and so stand alone.
_OF_OTHER_DATA = ("draw", "forward", "score", "digest", "encode", "epochs", "epoch_steps")


@dataclass(frozen=True)
class CombinedOptions:
    """Options of combined methods.

    Attributes:
        parts: method name -> an instance of its `Options`; methods left out have their defaults.
    """

    parts: Mapping[str, Any] = field(default_factory=dict)


class Combined(Strategy):
    """Several methods that train one SAM.

    Losses and kept bytes are added, replay buffers joined, states nested; `after_backward` and the
    other events reach every method in order. One method, the lead, may also define how prompts are
    chosen, decoded and scored and what is saved.
    """

    Options: ClassVar[type[Any]] = CombinedOptions
    _methods: ClassVar[tuple[type[Strategy], ...]]
    _lead: ClassVar[type[Strategy]]

    def __init__(self, context: StrategyContext) -> None:
        options = CombinedOptions() if context.options is None else context.options
        names = [cls.name for cls in self._methods]
        if not isinstance(options, CombinedOptions):
            raise TypeError(
                f"{'+'.join(names)} takes CombinedOptions(parts) as method_options, got "
                f"{type(options).__qualname__}."
            )
        for name in options.parts:
            if name not in names:
                raise unknown_name("combined method", name, names)
        self._parts = {
            cls.name: cls(replace(context, options=options.parts.get(cls.name)))
            for cls in self._methods
        }
        self._leader = self._parts[self._lead.name]
        super().__init__(context)
        self.options = CombinedOptions({name: p.options for name, p in self._parts.items()})
        self._share()

    def _share(self) -> None:
        """Let all methods see the SAM that the lead trains."""
        self.sam, self.task = self._leader.sam, self._leader.task
        for part in self._parts.values():
            part.sam = self.sam

    def _pretrained(self) -> Any:
        return self._leader.sam

    def before_task(self, task: int) -> None:
        # The lead may start from another SAM, which the others must see.
        self._leader.before_task(task)
        self._share()
        for part in self._parts.values():
            if part is not self._leader:
                part.before_task(task)

    def replayed(self) -> list[Pool]:
        return [pool for part in self._parts.values() for pool in part.replayed()]

    def loss(self, batch: Batch, masks: MaskLoss) -> Tensor | float:
        return sum(part.loss(batch, masks) for part in self._parts.values())

    def facts(self) -> dict[str, Any]:
        found = {name: part.facts() for name, part in self._parts.items()}
        return {name: own for name, own in found.items() if own}

    def adapter(self) -> Adapter:
        return replace(self._leader.adapter(), method=self.name)

    def state(self) -> dict[str, Any]:
        return super().state() | {"parts": {name: p.state() for name, p in self._parts.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.set_state(state["parts"][name])
        super().set_state(state)
        self._share()

    def kept_bytes(self) -> int:
        weights = super().kept_bytes()
        more = (p.kept_bytes() - weights for p in self._parts.values() if p is not self._leader)
        return self._leader.kept_bytes() + sum(more)


def _by_lead(name: str) -> Any:
    """A hook that the lead alone answers."""
    if isinstance(getattr(Strategy, name), property):
        return property(lambda self: getattr(self._leader, name))
    return lambda self, *args: getattr(self._leader, name)(*args)


def _by_all(name: str) -> Any:
    """A hook that reaches every method in order."""

    def call(self: Combined, *args: Any) -> None:
        for part in self._parts.values():
            getattr(part, name)(*args)

    return call


for _name in _EXCLUSIVE:
    if _name not in vars(Combined):
        setattr(Combined, _name, _by_lead(_name))
for _name in ("after_backward", "after_step", "after_task"):
    setattr(Combined, _name, _by_all(_name))


@functools.cache
def combined(name: str) -> type[Combined]:
    """The strategy of "METHOD+METHOD".

    Raises:
        ValueError: a name is unknown or occurs twice, or the methods cannot be combined.
    """
    methods = tuple(STRATEGIES.get(part) for part in name.split("+"))
    if len(set(methods)) < len(methods):
        raise ValueError(f"Method {name!r}: name every method once.")
    leads = [cls for cls in methods if any(_overrides(cls, hook) for hook in _EXCLUSIVE)]
    tunes = tuple(tune for tune in methods[0].tunes if all(tune in cls.tunes for cls in methods))
    alone = [cls for cls in methods if cls.joint or not cls.learns]
    alone += [cls for cls in methods if any(_overrides(cls, hook) for hook in _OF_OTHER_DATA)]
    if len(leads) > 1 or not tunes or alone:
        raise ValueError(
            f"Method {name!r}: these methods cannot be combined. At most one of them may define "
            "what is trained, decoded and saved, all must share a tune target, and joint, "
            "zero_shot and semantic stand alone. Combine, for example, ewc+er or lwf+er."
        )
    lead = (leads or methods)[0]
    default = lead.default_tune if lead.default_tune in tunes else tunes[0]
    attributes = {"name": name, "tunes": tunes, "default_tune": default}
    return type(name, (Combined,), attributes | {"_methods": methods, "_lead": lead})


STRATEGIES.combine = combined


def _overrides(cls: type[Strategy], hook: str) -> bool:
    return getattr(cls, hook) is not getattr(Strategy, hook)
