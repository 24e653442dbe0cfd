#!/bin/sh
# A part of the suite on one GPU, at most eight minutes: run it until its exit status is 0. Nothing is downloaded.
#
#     sh run.sh PACKED WORK [options of suite.py]
#
# PACKED is the folder of pack.py; WORK gets emoji_lt/, vit.safetensors and results.jsonl, which the next part continues.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
packed=$1 work=$2
shift 2
mkdir -p "$work"
[ -d "$work/emoji_lt" ] || python3 "$here/pack.py" unpack "$packed" "$work"
cd "$work"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2
exec python3 "$here/suite.py" emoji_lt --output results.jsonl "$@"
