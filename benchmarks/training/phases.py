"""Train an agent, and measure where the time goes: a script for one checkout and one process.

    PYTHONPATH=CHECKOUT python phases.py SECONDS.json OPTION...

It imports nothing of its own checkout: it patches functions of the one on the path, which may be
older. OPTIONs are those of `agents.train_ppo`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import resource
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Stage of a run -> its functions, MODULE:NAME in this checkout or in older ones. A function that a
#: checkout does not have is left out.
STAGES = {
    "training": ("stable_baselines3:PPO.learn",),
    "evaluation": ("agents.evaluate:evaluate",),
    "pictures": (
        "agents.evaluate:film_episodes",
        "agents.curves:plot_learning_curve",
        "agents.curves:plot_iou_after_steps",
        "sam_gym.utils.render:save_gif",
        "sam_gym.render:save_gif",
    ),
}
#: Phase of a stage -> its functions, alike.
PHASES = {
    "encode": ("sam_gym.backbones.service:Backbone.encode",),
    "decode": (
        "sam_gym.backbones.service:Backbone.decode_best",
        "sam_gym.backbones.service:Backbone.predict_iou",
    ),
    "draw targets": (
        "sam_gym.envs.base_core:BaseCore._draw_all",
        "sam_gym.envs.slots:SlotCore._draw_all",
    ),
    "rest of the step": (
        "sam_gym.envs.base_env:BaseVectorEnv.step",
        "sam_gym.envs.base_env:BaseVectorEnv.reset",
        "sam_gym.envs.faces:SlotVectorEnv.step",
        "sam_gym.envs.faces:SlotVectorEnv.reset",
    ),
    "policy": (
        "agents.policies.base:SamPolicy.forward",
        "agents.policies.base:SamPolicy.predict_values",
        "agents.policies:SlotPolicy.forward",
        "agents.policies:SlotPolicy.predict_values",
        "agents.evaluate:PolicyAgent.act",
    ),
    "baselines": (
        "agents.baselines.click:ConfidentAgent.act",
        "agents.baselines.click:OracleAgent.act",
        "agents.baselines:ConfidentAgent.act",
        "agents.baselines:OracleAgent.act",
    ),
    "update": (
        "stable_baselines3:PPO.train",
        "agents.policies.target_map:TrainTargetMap.update",
    ),
}
COMMAND = "agents.train_ppo"
#: Name of the stage and of the phase outside of all functions.
REST = "other"


class Stopwatch:
    """Attributes the time of one thread to the innermost stage and phase that it is in."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = {}
        self._place, self._since = (REST, REST), time.perf_counter()
        self._thread = threading.get_ident()

    def _switch(self, place: tuple[str, str]) -> None:
        now = time.perf_counter()
        self.seconds[self._place] = self.seconds.get(self._place, 0.0) + now - self._since
        self._place, self._since = place, now

    def stop(self) -> None:
        """Attribute the time until now."""
        self._switch(self._place)

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return a function whose time is attributed to a stage or phase."""

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            before = self._place
            self._switch((name, REST) if name in STAGES else (before[0], name))
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(before)

        return measured

    def install(self) -> None:
        """Patch the functions of all stages and phases; raise `LookupError` if one has none."""
        for name, places in (STAGES | PHASES).items():
            if not [place for place in places if self._patch(place, name)]:
                raise LookupError(f"None of the functions of {name!r} exists: {', '.join(places)}.")

    def _patch(self, place: str, name: str) -> bool:
        module_name, _, path = place.partition(":")
        *owners, attribute = path.split(".")
        try:
            owner = functools.reduce(getattr, owners, importlib.import_module(module_name))
            function = inspect.getattr_static(owner, attribute)
        except (ImportError, AttributeError):
            return False
        measured = self.timed(function, name)
        setattr(owner, attribute, measured)
        if not owners:
            # Other modules have imported the function by name.
            for module in list(sys.modules.values()):
                own = getattr(module, "__dict__", {})
                for alias in [key for key, value in own.items() if value is function]:
                    own[alias] = measured
        return True


def main(out: Path, options: list[str]) -> None:
    """Run `python -m agents.train_ppo` and write the seconds of each stage and phase.

    Args:
        out: JSON file: `seconds` by stage and phase, `total`, and `peak_mib` of resident memory.
        options: of the command.
    """
    watch = Stopwatch()
    watch.install()
    # As a command, not as a function: a command also sets up the allocator of its process.
    sys.argv = [COMMAND, *options]
    runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)
    watch.stop()
    seconds: dict[str, dict[str, float]] = {}
    for (stage, phase), own in watch.seconds.items():
        seconds.setdefault(stage, {})[phase] = own
    content = {
        "checkout": str(Path(str(importlib.import_module("agents").__file__)).resolve().parents[1]),
        "seconds": seconds,
        "total": sum(watch.seconds.values()),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    out.write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
