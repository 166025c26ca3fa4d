#!/usr/bin/env bash
# Build FFCV 1.0.2 into one Python environment, leanly.
#
#   usage: scripts/install-ffcv.sh [PYTHON]      (default: .venv/bin/python)
#
# FFCV's own set-up asks pkg-config for all of OpenCV and pip for ten packages. It uses two OpenCV modules
# and three packages. So: show it an opencv4.pc and an opencv.hpp that name only core and imgproc, install
# it without its dependencies, and add what its imports need. Does nothing when it already works.
set -euo pipefail

python=${1:-.venv/bin/python}
version=1.0.2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
# FFCV's own __version__ is wrong; only the metadata can be trusted.
installed() { "$python" -c "from importlib.metadata import version as v; assert v('ffcv') == '$version'" 2>/dev/null; }
imports() { "$python" -W ignore -c "import ffcv.loader" 2>"$work/import.log"; }
fail() { echo "install-ffcv: $*" >&2; exit 1; }

installed && imports && exit 0

# Never opencv-python: it overwrites the headless files and needs libGL.
needs=(tqdm pillow)
"$python" -c "import cv2" 2>/dev/null || needs+=(opencv-python-headless)
# FFCV imports distutils, which Python 3.12 dropped and setuptools still carries.
"$python" -c "import sys; sys.exit(sys.version_info < (3, 12))" && needs+=(setuptools)
pip install -q "${needs[@]}"

mkdir -p "$work/include/opencv2"
printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' > "$work/include/opencv2/opencv.hpp"
cat > "$work/opencv4.pc" <<PC
Name: OpenCV
Description: core and imgproc only
Version: 4
Libs: -lopencv_imgproc -lopencv_core
Cflags: -I$work/include -I/usr/include/opencv4
PC

echo "building ffcv $version (half a minute)"
# No cache: a wheel built earlier may be linked to an OpenCV that has since been upgraded.
PKG_CONFIG_PATH="$work${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}" LDFLAGS="-Wl,--as-needed ${LDFLAGS:-}" \
    CC=${CC:-gcc} CXX=${CXX:-g++} \
    pip install --no-deps --no-cache-dir --force-reinstall --no-binary ffcv "ffcv==$version" > "$work/build.log" 2>&1 ||
    { tail -n 40 "$work/build.log" >&2; fail "ffcv $version did not build; the compiler's words are above"; }

imports || fail "ffcv $version was built but cannot be imported: $(tail -n 1 "$work/import.log")"
