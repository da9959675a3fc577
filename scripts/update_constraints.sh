#!/usr/bin/env bash
# Resolve the newest versions that pyproject.toml allows, in a venv of their own, and write them to constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3.11}"
torch="$(grep -E '^torch==' constraints.txt)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "$torch" -e '.[train,ray,quantized,whisper,mic,serve,dev]'
grep '^#' constraints.txt >"$folder/constraints.txt"
# Local versions (torch's "+cpu") and the packages that belong to one build of torch would tie users to this machine's.
"$folder/venv/bin/pip" freeze --all | sed -E 's/\+[a-z0-9.]+$//' |
    grep -viE '^(#|-e |pip=|wheel=|omni[-_]adapter|triton|nvidia-|cuda-)' | LC_ALL=C sort -f >>"$folder/constraints.txt"
mv "$folder/constraints.txt" constraints.txt
