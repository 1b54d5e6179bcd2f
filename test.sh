#!/usr/bin/env bash
# Runs the tests, in the .venv of quickstart.sh, which is made if it is not there. `bash test.sh -k model` runs some.
set -euo pipefail
cd "$(dirname "$0")"
bash quickstart.sh --setup_only
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe
"$python" -m pip install --quiet -r tests/requirements.txt
exec "$python" -m pytest -q -n 2 --dist loadgroup tests "$@"
