#!/usr/bin/env bash
# From nothing to stories in one go: makes .venv, installs what is needed, runs the four steps on the
# built-in text, and shows what the new model writes. Takes about 5 minutes on 2 CPU cores. Run it again
# to see it again: what is done is not done twice. SETUP_ONLY=1 stops after the installation.
set -euo pipefail
cd "$(dirname "$0")"

say() { printf '\n== %s\n' "$*"; }

say "1. Python packages, in .venv"
if [ ! -d .venv ]; then
    for candidate in python3 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
        candidate=
    done
    [ -n "$candidate" ] || { echo "error: no Python 3.10 or newer; get one from https://www.python.org" >&2; exit 1; }
    "$candidate" -m venv .venv
fi
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe    # Windows
if ! "$python" -c 'import torch' 2>/dev/null && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    # PyPI's torch for Linux brings several GB of CUDA; without an NVIDIA GPU the CPU build is enough.
    "$python" -m pip install --quiet --retries 0 --timeout 15 "$(grep '^torch' requirements.txt)" \
        --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" ||
        echo "the index of CPU builds cannot be reached; trying the usual one"
fi
"$python" -m pip install --quiet -r requirements.txt ${EXTRA_REQUIREMENTS:-}
[ -z "${SETUP_ONLY:-}" ] || exit 0
