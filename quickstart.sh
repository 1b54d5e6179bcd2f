#!/usr/bin/env bash
# From nothing to stories: makes .venv, installs what is needed, runs the four steps on the built-in text
# and shows what the new model writes. About 4 minutes on 2 CPU cores after the installation.
# Run it again after a break: what is done is not done twice. `bash quickstart.sh --setup_only` only installs.
set -euo pipefail
cd "$(dirname "$0")"

[ -z "${1:-}" ] || [ "$1" = --setup_only ] || { sed -n '2,/^set/s/^# //p' "$0"; exit 0; }

say() { printf '\n== %s\n' "$*"; }

say "Python packages, in .venv"
if ! [ -x .venv/bin/python ] && ! [ -x .venv/Scripts/python.exe ]; then
    for candidate in python3 python python3.{14,13,12,11,10}; do
        "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null && break
        candidate=
    done
    [ -n "$candidate" ] || {
        echo "error: no Python 3.10 to 3.14, for which PyTorch 2.13 is made; get one from https://www.python.org" >&2
        exit 1; }
    "$candidate" -c 'import platform, sys; sys.exit((platform.system(), platform.machine()) == ("Darwin", "x86_64"))' || {
        echo "error: PyTorch is made for Macs with Apple processors only, and so must $candidate be" >&2; exit 1; }
    "$candidate" -m venv .venv
fi
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe     # Windows
# PyPI's torch brings several GB of CUDA 13 on Linux, and no CUDA on Windows. Other builds have an index of their own.
build=
if command -v nvidia-smi >/dev/null; then
    oldest=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1) || oldest=
    case $oldest in
        [1-6].* | 7.[0-4]) build=cu126 ;;                               # the last CUDA for GPUs of before 2018
        *) [ -x .venv/bin/python ] || build=cu130 ;;                    # Windows
    esac
elif [ "$(uname -s)" = Linux ]; then
    build=cpu
fi
if [ -n "$build" ] && ! "$python" -c 'import torch' 2>/dev/null; then
    "$python" -m pip install --quiet --retries 0 --timeout 20 \
        --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/$build}" "$(grep '^torch==' requirements.txt)" \
        2>/dev/null || echo "no $build build of torch within reach; taking what pip finds"
fi
"$python" -m pip install --quiet -r requirements.txt
[ "${1:-}" != --setup_only ] || { echo "all is there; next: source $(dirname "$python")/activate"; exit 0; }

data=data/quickstart out=output/quickstart
if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    model=(--preset gpu_2gb --max_minutes 3)
else
    model=(--preset cpu_3min)
fi

say "step 1 of 4: a vocabulary, from synthetic stories"
"$python" train_vocab.py --data_dir $data --vocab_size 2048
say "step 2 of 4: the text as token ids"
"$python" preprocess.py --data_dir $data
say "step 3 of 4: training"
"$python" train.py --data_dir $data --out_dir $out --log_interval 50 --sample_tokens 0 "${model[@]}"
say "step 4 of 4: what the model writes"
"$python" sample.py --checkpoint $out/ckpt.pt --temperature 0.5 --num_samples 3 --prompt "Once upon a time"

say "Done. The model is $out/ckpt.pt, the vocabulary in $data, the stories it learned from in data/demo."
cat <<END
Try:   $python sample.py --checkpoint $out/ckpt.pt --prompt "Lily was a brave girl"
       $python train.py --init_from resume --out_dir $out --max_minutes 10     # the same model, longer
Then:  $python train_vocab.py --download True --vocab_size 4096                # real stories: see README.md
END
