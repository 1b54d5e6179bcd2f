#!/usr/bin/env bash
# From nothing to stories: create .venv, install the packages, run the four steps on the built-in text and print
# three stories of the new model. About 4 minutes on 2 CPU cores, with a fast download.
# Run it again after an interruption: it skips finished steps. `bash quickstart.sh --setup_only` only installs.
set -euo pipefail
cd "$(dirname "$0")"

[ -z "${1:-}" ] || [ "$1" = --setup_only ] || { sed -n '2,/^set/s/^# //p' "$0"; exit 0; }

say() { printf '\n== %s\n' "$*"; }

say "Python packages"
if ! [ -x .venv/bin/python ] && ! [ -x .venv/Scripts/python.exe ]; then
    for candidate in python3 python python3.{14,13,12,11,10}; do
        "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null && break
        candidate=
    done
    [ -n "$candidate" ] || {
        echo "error: no Python 3.10 to 3.14, which PyTorch needs; get one from https://www.python.org" >&2
        exit 1; }
    "$candidate" -c 'import platform, sys; sys.exit((platform.system(), platform.machine()) == ("Darwin", "x86_64"))' || {
        echo "error: PyTorch needs a Mac with Apple silicon, and $candidate built for it" >&2; exit 1; }
    if ! "$candidate" -m tinyllm.compat >/dev/null 2>&1; then
        "$candidate" -m venv .venv
    elif "$candidate" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
        # .venv uses the PyTorch of this Python, as on Colab, where venv cannot install pip but finds it
        "$candidate" -m venv --system-site-packages .venv >/dev/null ||
            "$candidate" -m venv --without-pip --system-site-packages .venv
    fi
fi
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe     # Windows
[ -x "$python" ] || python=$(command -v "$candidate")   # an active environment that has PyTorch
"$python" -c "import pip" 2>/dev/null || {
    echo "error: $python has no pip; expected pip, to install the packages" >&2
    echo "       $python -m ensurepip" >&2
    exit 1; }
# PyPI's torch brings several GB of CUDA 13 on Linux, and no CUDA on Windows. Other builds have their own index.
build=
if command -v nvidia-smi >/dev/null; then
    oldest=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1) || oldest=
    case $oldest in
        [1-6].* | 7.[0-4]) build=cu126 ;;                               # the last CUDA for GPUs before 2018
        *) [ -x .venv/bin/python ] || build=cu130 ;;                    # Windows
    esac
elif [ "$(uname -s)" = Linux ]; then
    build=cpu
fi
if "$python" -m tinyllm.compat 2>/dev/null; then        # another PyTorch than in requirements.txt stays
    "$python" -m pip install --quiet $(sed 's/ *#.*//; /^torch==/d' requirements.txt)
else
    [ -z "$build" ] || "$python" -m pip install --quiet --retries 0 --timeout 20 \
        --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/$build}" "$(grep '^torch==' requirements.txt)" \
        2>/dev/null || echo "no $build build of torch can be reached; pip installs its default"
    "$python" -m pip install --quiet -r requirements.txt
fi
[ "${1:-}" != --setup_only ] || { echo "installed; next: source $(dirname "$python")/activate"; exit 0; }

data=data/quickstart out=output/quickstart
if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    model=(--preset gpu_2gb --max_minutes 3)
else
    model=(--preset cpu_3min)
fi

say "step 1 of 4: learn a vocabulary from synthetic stories"
"$python" train_vocab.py --data_dir $data --vocab_size 2048
say "step 2 of 4: turn the text into token ids"
"$python" preprocess.py --data_dir $data
say "step 3 of 4: train"
"$python" train.py --data_dir $data --out_dir $out --log_interval 50 --sample_tokens 0 "${model[@]}"
say "step 4 of 4: generate three stories"
"$python" sample.py --checkpoint $out/ckpt.pt --temperature 0.5 --num_samples 3 --prompt "Once upon a time"

say "Done. The model is $out/ckpt.pt, the vocabulary in $data, the training stories in data/demo."
cat <<END
Try:   $python sample.py --checkpoint $out/ckpt.pt --prompt "Lily was a brave girl"
       $python train.py --init_from resume --out_dir $out --max_minutes 10     # the same model, longer
Then:  $python train_vocab.py --download True --vocab_size 4096                # real stories
END
