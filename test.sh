#!/usr/bin/env bash
# Runs the tests, in the .venv of quickstart.sh, which is made if it is not there. `bash test.sh -k model` runs some.
# `bash test.sh --gpu` runs the tests that need a GPU, and no others.
set -euo pipefail
cd "$(dirname "$0")"
bash quickstart.sh --setup_only
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe
[ -x "$python" ] || python=python           # an active environment that has PyTorch
"$python" -m pip install --quiet -r tests/requirements.txt
processes=2
case " $* " in *" --gpu "*) processes=0 ;; esac         # the tests share one GPU
exec "$python" -m pytest -q -n $processes --dist loadgroup tests "$@"
