#!/usr/bin/env bash
# Make a virtual environment in $1. On a bare Debian machine, as root, first get what that takes.
set -euo pipefail

target=$1
wanted="3.11"

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3 python3.12 python3.13 python3.14}; do
        if suits "$name"; then
            command -v "$name"
            return
        fi
    done
}

apt() {
    echo "installing $* with apt-get"
    [ -n "${apt_updated:-}" ] || apt-get update -qq </dev/null
    apt_updated=1
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" </dev/null >/dev/null
}

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

python=$(find_python)
if [ -z "$python" ] && may_install; then
    apt python3 python3-venv
    python=$(find_python)
fi
if [ -z "$python" ]; then
    echo "worker-orcd needs Python $wanted or later; none was found (set PYTHON=)" >&2
    exit 1
fi

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! may_install; then
        echo "$python cannot make virtual environments; install python$version-venv" >&2
        exit 1
    fi
    apt "python$version-venv"
fi

if ! command -v "${CC:-cc}" >/dev/null && ! command -v gcc >/dev/null; then
    if may_install; then
        apt gcc libc6-dev || echo "no C compiler could be installed: the CPU kernels will be slow" >&2
    else
        echo "no C compiler found: the CPU kernels will be slow (install gcc to change that)" >&2
    fi
fi

echo "making $target with $("$python" --version)"
"$python" -m venv "$target"
