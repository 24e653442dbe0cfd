#!/bin/sh
# Runs the core tests with the oldest supported timm and transformers: `sh tests/floors.sh [folder for the environments]`.
#
# Each environment holds only these two libraries, tokenizers and huggingface_hub; torch and the rest come from the
# Python that runs this (PYTHON, default "python"), by a .pth file behind the environment's own packages. Needs a
# package index. The floors themselves are in pyproject.toml.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
HOME_OF_ALL=${1:-$(mktemp -d)}
BASE=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
CORE="tests/test_prompting.py tests/test_golden.py tests/backbones/test_fingerprint_and_freezing.py tests/test_adapter.py
    tests/test_adapter_state.py tests/checkpoint/test_round_trip.py tests/test_prompts.py tests/losses/test_losses.py tests/backbones"
PYTHONPATH=$PWD
OMP_NUM_THREADS=1
export PYTHONPATH OMP_NUM_THREADS

make_environment() { # folder, then requirements that are installed without what they need
    [ -d "$1" ] && return
    "$PYTHON" -m venv --without-pip "$1"
    "$PYTHON" -m pip --python "$1/bin/python" install --quiet "huggingface_hub==1.5.*"
    folder=$1 && shift
    "$PYTHON" -m pip --python "$folder/bin/python" install --quiet --no-deps "$@"
    echo "$BASE" > "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
}

make_environment "$HOME_OF_ALL/floors" timm==1.0.9 transformers==5.9.0 tokenizers==0.22.2
FLOORS="$HOME_OF_ALL/floors/bin/python"
"$FLOORS" -W ignore -c 'import timm, transformers as t; print("timm", timm.__version__, "transformers", t.__version__)'
# open_clip needs a later timm, so its tests and the compatibility table, which has rows of it, are left out.
"$FLOORS" -m pytest -q -p no:cacheprovider $CORE --ignore=tests/backbones/test_open_clip.py \
    --ignore=tests/backbones/test_compatibility.py --ignore=tests/backbones/test_tables.py
