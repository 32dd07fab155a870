#!/usr/bin/env bash
# RL Zoo: in a fresh environment, agents train, but `enjoy` cannot be imported.
#
# Versions: rl_zoo3 2.9.2, huggingface_hub 2.4.0, Python 3.11.
# Expected: `python -m rl_zoo3.enjoy` plays an agent where `python -m rl_zoo3.train` has trained it.
# Seen: rl_zoo3 imports `requests` for `enjoy` only, and requires it nowhere. It used to come with
#   huggingface_hub, which has replaced it by httpx. Training and tuning work; hours later,
#   playing ends with ModuleNotFoundError. `pip install requests` is the remedy.
# Exits non-zero if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet rl_zoo3==2.9.2 huggingface_hub==2.4.0
cd "$work"
venv/bin/python - <<'PYTHON'
import importlib.metadata
import subprocess
import sys


def fails(module):
    """The last line of what `python -m MODULE --help` says, if it fails."""
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stderr.strip().splitlines()[-1] if result.returncode else None


required = importlib.metadata.requires("rl_zoo3")
print("requests among the requirements:", any(own.startswith("requests") for own in required))
seen = {module: fails(module) for module in ("rl_zoo3.train", "rl_zoo3.enjoy")}
for module, line in seen.items():
    print(f"{module}: {line or 'works'}")
assert seen["rl_zoo3.train"] is None, "the behaviour has changed"
assert seen["rl_zoo3.enjoy"] == "ModuleNotFoundError: No module named 'requests'", (
    "the behaviour has changed"
)
PYTHON
