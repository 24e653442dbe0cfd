#!/bin/sh
# Runs the Hub tests with huggingface_hub 0.36, 1.x and 2.x: `sh tests/hub/versions.sh [folder for the environments]`.
#
# Each environment holds only the client and its dependencies. A .pth file adds the packages of $PYTHON (default
# "python") after them: torch, timm and the rest. Needs a package index.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
ENVIRONMENTS=${1:-$(mktemp -d)}
BASE=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
FAILED=""
for VERSION in 0.36 1 2; do
    ENVIRONMENT="$ENVIRONMENTS/hub-$VERSION"
    if [ ! -d "$ENVIRONMENT" ]; then
        "$PYTHON" -m venv --without-pip "$ENVIRONMENT"
        "$PYTHON" -m pip --python "$ENVIRONMENT/bin/python" install --quiet "huggingface_hub==$VERSION.*"
        OWN=$("$ENVIRONMENT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "$BASE" > "$OWN/behind.pth"
    fi
    "$ENVIRONMENT/bin/python" -c 'import huggingface_hub as h, timm; print("huggingface_hub", h.__version__, h.__file__)'
    "$ENVIRONMENT/bin/python" -m tests.hub -q -p no:warnings || FAILED="$FAILED $VERSION"
done
if [ -n "$FAILED" ]; then
    echo "failed with huggingface_hub$FAILED"
    exit 1
fi
