#!/usr/bin/env bash
# Measure on a machine with an NVIDIA GPU and no network: see gpu_lease.md.
#
#     bash bench/gpu_lease.sh WHEELS MODEL.gguf OUT [options of `gpu.py all`]
#
# Installs what lies in the folder WHEELS, builds localds unless its wheel is there, writes MODEL.gguf
# (V2-Lite's geometry, random weights, 10 GB) unless it exists, and runs everything. What is done
# already, in an earlier call, is not done again. PYTHON names the Python, SITE the folder of packages.
set -euo pipefail

wheels=$(realpath "$1")
model=$2
out=$3
shift 3
root=$(dirname "$(dirname "$(realpath "$0")")")
python=${PYTHON:-python3}
site=${SITE:-/tmp/localds-gpu-site}
parity=$site/parity
export PYTHONPATH=$site
# The build may take all cores but for one, which writes the model.
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(($(nproc) > 1 ? $(nproc) - 1 : 1))}

say() { echo "[$SECONDS s] $*"; }

install_wheels() {
    mkdir -p "$site"
    # A wheel too large to carry at once, packed anew and cut into parts.
    if compgen -G "$wheels/*.tar.xz.00" >/dev/null; then
        cat "$wheels"/*.tar.xz.[0-9][0-9] | tar -xJf - -C "$site" &
    fi
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site.wheels" \
        "$wheels"/*.whl
    wait
    # Several wheels have a part of one package.
    cp -r "$site.wheels/." "$site/"
    rm -rf "$site.wheels"
}

build_localds() {
    compgen -G "$wheels/localds-*.whl" >/dev/null && return
    "$python" -m pip install -q --no-index --no-build-isolation --no-deps --no-compile \
        --target "$site" --upgrade "$root"
}

# MLX's wheel looks for CUDA's libraries beside itself; torch has brought the same ones.
libraries() {
    local packages
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    [ -d "$packages/nvidia" ] || return 0
    find "$packages/nvidia" -type d -name lib | paste -sd: -
}

write_model() {
    [ -e "$model" ] && return
    "$python" "$root/bench/make_large_gguf.py" "$model.part" --experts 64
    mv "$model.part" "$model"
}

if [ ! -e "$site/.ready" ]; then
    install_wheels
    say "wheels installed"
    build_localds &
    building=$!
    write_model
    wait "$building"
    say "localds and the model are there"
    touch "$site/.ready"
fi
write_model

LD_LIBRARY_PATH=$(libraries)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}

if [ ! -e "$parity/.ready" ]; then
    if "$python" "$root/bench/gpu.py" make-parity "$parity"; then
        touch "$parity/.ready"
    else
        say "no models for parity: $parity is left as it is"
    fi
    say "models for parity"
fi
exec "$python" "$root/bench/gpu.py" all "$model" --out "$out" --parity "$parity" "$@"
