#!/usr/bin/env bash
# tyro leaves a `dict[str, Any]` field without a command-line option, and says nothing.
#
# Version: tyro 1.0.17.
# Expected: `kwargs: dict[str, Any]` gets an option as `dict[str, str]` does (--kwargs KEY VALUE ...),
#   or tyro.cli raises, as it does for fields that it cannot parse and that have no default.
# Seen: with an empty default the field is missing from --help and --kwargs is an unrecognized option;
#   with a default of {"length": 3} there is --kwargs.length, and no way to add another key. Configs
#   that pass keyword arguments on (env_kwargs, dataset_kwargs, policy_kwargs) are often typed so.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install --quiet --target "$work/site" tyro==1.0.17
PYTHONPATH="$work/site" python3 - <<'PYTHON'
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import tyro


@dataclass
class Untyped:
    learning_rate: float = 0.1
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Typed:
    learning_rate: float = 0.1
    kwargs: dict[str, str] = field(default_factory=dict)


@dataclass
class Filled:
    learning_rate: float = 0.1
    kwargs: dict[str, Any] = field(default_factory=lambda: {"length": 3})


def run(config: type, *args: str) -> Any:
    """The parsed config, or the exit status and all that was printed."""
    text = StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        try:
            return tyro.cli(config, args=args)
        except SystemExit as error:
            return error.code, text.getvalue()


assert run(Typed, "--kwargs", "kind", "night").kwargs == {"kind": "night"}
status, text = run(Untyped, "--help")
assert status == 0 and "kwargs" not in text, text
print("--help of dict[str, Any] = {}: no option for it")
status, text = run(Untyped, "--kwargs", "kind", "night")
assert status == 2 and "Unrecognized" in text, text
print("--kwargs kind night: unrecognized")
assert run(Filled, "--kwargs.length", "4").kwargs == {"length": 4}
status, text = run(Filled, "--kwargs.kind", "night")
assert status == 2, text
print("a default of {'length': 3}: --kwargs.length only")
PYTHON
