# Sourced by check_webgpu.sh and check_directml.sh: the model that both decode, and backports' Mesa.

# The speaking Phi-3 made from SmolLM2 (same weights under the phi3 architecture) as an ONNX folder.
# Usage: model_folder OUTPUT TARGET   needs an interpreter ($python) with nybble and gguf
model_folder() {
    local output=$1 target=$2 source phi3
    [ -f "$output/genai_config.json" ] && return
    phi3="$(dirname "$output")/phi3-from-smollm2.gguf"
    if [ ! -f "$phi3" ]; then
        source="${NYBBLE_TEST_MODELS:+$NYBBLE_TEST_MODELS/smollm2-135m-instruct-q4_1.gguf}"
        [ -n "$source" ] || source="$("$python" -c 'from nybble import hub; print(hub.resolve("smollm2"))')"
        "$python" tests/support/phi3_from_smollm2.py "$source" "$phi3.partial"
        mv "$phi3.partial" "$phi3"
    fi
    if [ "$target" = onnx-dml-int4 ]; then # by AWQ
        "$python" -m nybble quantize "$phi3" "$output" --recipe "$target" --windows 16 --quiet
    else
        "$python" -m nybble convert "$phi3" "$output" --to "$target" --method rtn --allow-lossy --quiet
    fi
}

# Mesa 25 with its software Vulkan. Debian 12's own 22.3.6 gives wrong numbers without any error.
need_mesa() {
    local version mirror file
    version="$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true)"
    if [ -n "$version" ] && dpkg --compare-versions "$version" ge 25; then return; fi
    if ! apt-cache policy mesa-vulkan-drivers | grep -q 'Candidate: 2[5-9]\|bookworm-backports'; then
        for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
            [ -f "$file" ] || continue
            mirror="$(sed -nE 's#^(URIs:|deb) +(https?:[^ ]+/debian/?)( .*)?$#\2#p' "$file" | head -n 1)"
            [ -z "$mirror" ] || break
        done
        echo "deb $mirror bookworm-backports main" >/etc/apt/sources.list.d/nybble-backports.list
        apt-get -qq update
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y -t bookworm-backports mesa-vulkan-drivers libvulkan1 >/dev/null
}
