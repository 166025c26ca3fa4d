#!/usr/bin/env bash
# Make .venv ready: system packages (only the missing ones), kdcache itself, FFCV.
#
#   usage: [PYTHON=python3] scripts/setup.sh EXTRAS      (for example: plot,digits)
#
# Asks apt for nothing, and needs no root, when nothing is missing. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=$1
python=${PYTHON:-python3}
venv=.venv
packages=()

fail() { echo "setup: $*" >&2; exit 1; }
need() { packages+=("$@"); }

# 1. What is missing? Look for the thing itself, so that any way of having installed it counts.
command -v g++ >/dev/null || need g++
command -v pkg-config >/dev/null || need pkg-config
[ -e /usr/include/opencv4/opencv2/imgproc.hpp ] || need libopencv-imgproc-dev
[ -e /usr/include/turbojpeg.h ] || need libturbojpeg0-dev
[ -e /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ] || need dataset-fashion-mnist
# Zarr 3 needs Python 3.11; where the one at hand is older (Ubuntu 22.04), take or get another.
older() { ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if "$python" -c '' 2>/dev/null && older "$python"; then
    for newer in python3.13 python3.12 python3.11; do
        older "$newer" || break
    done
    echo "setup: $python is older than 3.11, taking $newer"
    python=$newer
fi
if "$python" -c '' 2>/dev/null; then
    name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    # Only Debian's own Python comes in parts.
    if "$python" -c 'import sys; sys.exit(sys.base_prefix != "/usr")'; then
        "$python" -c 'import ensurepip' 2>/dev/null || need "$name-venv"
        [ -e "/usr/include/$name/Python.h" ] || need "$name-dev"
    fi
else
    need "$python" "$python-venv" "$python-dev"
fi

# 2. Ask apt for it, as root or through a sudo that wants no password.
if [ ${#packages[@]} -gt 0 ]; then
    ask="missing system packages; ask an administrator for: apt-get install --no-install-recommends ${packages[*]}"
    command -v apt-get >/dev/null || fail "$ask"
    sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n apt-get --version >/dev/null 2>&1 || fail "$ask"
        sudo=(sudo -n)
    fi
    echo "installing system packages: ${packages[*]}"
    # A failing update (one dead mirror among several) need not make the install fail.
    export DEBIAN_FRONTEND=noninteractive
    "${sudo[@]}" apt-get update -qq </dev/null || true
    "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}" </dev/null || fail "$ask"
fi

# 3. The environment; one left half made, or made for a Python since removed, is made afresh.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
echo "installing kdcache[$extras] into $venv (torch is large: minutes, the first time)"
quiet=(-q)
[ -t 1 ] && quiet=()
"$venv/bin/python" -m pip install --disable-pip-version-check "${quiet[@]}" -e ".[$extras]"
scripts/install-ffcv.sh "$venv/bin/python"
