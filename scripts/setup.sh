#!/usr/bin/env bash
# Set a machine up for omni-adapter; does nothing that is already done.
#
#   scripts/setup.sh venv [EXTRAS]    .venv with the package in editable form, and EXTRAS such as "dev" or "dev,train"
#   scripts/setup.sh programs NAME…   Debian packages that bring the programs NAME…, if they are missing
#
# Reads PYTHON (interpreter, 3.11 or later) and VENV (folder, default .venv) from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH="torch==2.13.0" # by its plain version: the platform's own build, see constraints.txt
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

apt_install() {
    command -v apt-get >/dev/null || return 1
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || return 1
        as_root=(sudo)
    fi
    say "installing $* with apt-get"
    "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

check_python() {
    command -v "$PYTHON" >/dev/null || die "no $PYTHON found; install Python 3.11 or later, or say make PYTHON=/path/to/python"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$PYTHON is $("$PYTHON" -V), Python 3.11 or later is needed; say make PYTHON=/path/to/python3.11"
}

# Debian splits ensurepip off into python3.X-venv, without which `python -m venv` stops halfway.
create_venv() {
    "$PYTHON" -m venv "$VENV" >/dev/null 2>&1 && return
    rm -rf "$VENV"
    local package
    package="$("$PYTHON" -c 'import sys; print(f"python3.{sys.version_info.minor}-venv")')"
    if apt_install "$package" && "$PYTHON" -m venv "$VENV"; then return; fi
    rm -rf "$VENV"
    say "the venv module does not work here; using virtualenv instead"
    "$PYTHON" -m pip install -q --target build/virtualenv virtualenv ||
        die "neither venv nor pip works for $PYTHON; install $package"
    PYTHONPATH=build/virtualenv "$PYTHON" -m virtualenv -q "$VENV"
}

setup_venv() {
    local extras="${1:+[$1]}"
    check_python
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then create_venv; fi
    say "installing omni-adapter$extras into $VENV (minutes the first time, seconds later)"
    local quiet=()
    if [ ! -t 1 ]; then quiet=(-q); fi # a person sees the downloads move
    "$VENV/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check "$TORCH" -c constraints.txt -e ".$extras"
}

setup_programs() {
    local name missing=()
    for name in "$@"; do
        command -v "$name" >/dev/null || missing+=("$name")
    done
    if [ "${#missing[@]}" -eq 0 ]; then return; fi
    apt_install "${missing[@]}" || die "missing: ${missing[*]}; install them with your package manager and try again"
}

case "${1:-}" in
venv) setup_venv "${2:-}" ;;
programs) shift && setup_programs "$@" ;;
*) die "usage: scripts/setup.sh venv [EXTRAS] | programs NAME…" ;;
esac
