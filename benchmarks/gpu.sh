#!/usr/bin/env bash
# Measure one NVIDIA GPU in about ten minutes, and write one JSON file and one table:
#
#   benchmarks/gpu.sh [--out FOLDER] [OPTION...]
#   benchmarks/gpu.sh --device cpu --quick    # try the script itself, without a GPU
#   benchmarks/gpu.sh --help
#
# PYTHON names the interpreter (default: python).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m benchmarks.run gpu "$@"
