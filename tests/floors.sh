#!/bin/sh
# Runs the core tests with the oldest supported timm and transformers: `sh tests/floors.sh [folder for the environments]`.
#
# The environment holds only these two libraries, tokenizers and huggingface_hub. A .pth file adds the packages of
# $PYTHON (default "python") after them: torch and the rest. Needs a package index. pyproject.toml has the versions.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
ENVIRONMENTS=${1:-$(mktemp -d)}
BASE=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
CORE="tests/test_prompting.py tests/test_golden.py tests/test_adapter.py tests/test_adapter_state.py tests/test_prompts.py
    tests/checkpoint/test_round_trip.py tests/losses/test_agcl.py tests/losses/test_lpt.py tests/backbones"
PYTHONPATH=$PWD
OMP_NUM_THREADS=1
export PYTHONPATH OMP_NUM_THREADS

make_environment() { # folder, then requirements that are installed without their dependencies
    [ -d "$1" ] && return
    "$PYTHON" -m venv --without-pip "$1"
    "$PYTHON" -m pip --python "$1/bin/python" install --quiet "huggingface_hub==1.5.*"
    folder=$1 && shift
    "$PYTHON" -m pip --python "$folder/bin/python" install --quiet --no-deps "$@"
    echo "$BASE" > "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
}

make_environment "$ENVIRONMENTS/floors" timm==1.0.9 transformers==5.9.0 tokenizers==0.22.2
FLOORS="$ENVIRONMENTS/floors/bin/python"
"$FLOORS" -W ignore -c 'import timm, transformers as t; print("timm", timm.__version__, "transformers", t.__version__)'
# open_clip needs a later timm: no tests of it, nor of the compatibility table, which has rows for it.
"$FLOORS" -m pytest -q -p no:cacheprovider $CORE --ignore=tests/backbones/test_open_clip.py \
    --ignore=tests/backbones/test_compatibility.py --ignore=tests/backbones/test_tables.py
