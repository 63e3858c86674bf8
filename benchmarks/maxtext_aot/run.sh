#!/usr/bin/env bash
# MaxText's train step and ours, compiled for the same slices and read by the same estimator.
#   benchmarks/maxtext_aot/run.sh [FOLDER] [--calibrate] [--only=NAME]
# FOLDER (default build/maxtext_aot) takes MaxText's environment and what the compilers report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=build/maxtext_aot
case "${1:-}" in "" | --*) ;; *) folder=$1 && shift ;; esac
python=$folder/venv/bin/python
if [ ! -x "$python" ]; then
  python3.12 -m venv "$folder/venv"  # its packages need 3.12; pyenv install 3.12
  "$python" -m pip install -q -r benchmarks/maxtext_aot/requirements.txt
fi
"${PYTHON:-python}" benchmarks/maxtext_aot/compare.py --maxtext="$python" --folder="$folder" "$@"
