#!/usr/bin/env bash
# Runs a model on ONNX Runtime's WebGPU provider, on Mesa's software Vulkan, and compares it with the CPU.
#
#   scripts/check_webgpu.sh [FOLDER]      about ten minutes; .ci/run does not need it
#
# Debian 12, root for apt. FOLDER: an ONNX decoder, best with float16 and no accuracy_level; without it
# the Phi-3 made from SmolLM2 is converted. Fails unless attention and matrix products ran on the
# provider. A GPU in the machine is used if VK_ICD_FILENAMES names its driver.
#   PYTHON=python3     an interpreter with nybble and gguf
#   WORK=DIR           where everything is kept (default: .cache/webgpu)
#   TOKENS=64          how many are decoded
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
work="${WORK:-$PWD/.cache/webgpu}"
mkdir -p "$work"
. scripts/provider_model.sh

if [ -z "${VK_ICD_FILENAMES:-}" ]; then
    need_mesa
    VK_ICD_FILENAMES="$(ls /usr/share/vulkan/icd.d/lvp_icd*.json | head -n 1)"
    export VK_ICD_FILENAMES
fi
venv="$work/venv"
if [ ! -d "$venv" ]; then
    "$python" -m venv "$venv"
    "$venv/bin/pip" -q install onnxruntime-webgpu==1.27.0 numpy onnx # not beside another onnxruntime
fi
folder="${1:-$work/model}"
[ $# -gt 0 ] || model_folder "$folder" onnx-cuda-int4 # float16 and rotary in attention, as WebGPU likes it

run="$venv/bin/python tests/devices/onnxruntime/remote/decode.py $folder"
export PYTHONPATH=src
$run cpu --output "$work/cpu.json" --tokens "${TOKENS:-64}" --threads 2
timeout "${SECONDS_LIMIT:-1800}" $run webgpu --output "$work/webgpu.json" --tokens "${TOKENS:-64}" --follow "$work/cpu.json"
"$venv/bin/python" tests/devices/onnxruntime/remote/compare.py "$work/cpu.json" "$work/webgpu.json"
