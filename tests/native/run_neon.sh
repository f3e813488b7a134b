#!/usr/bin/env bash
# Builds the native library for 64-bit Arm with its real flags and tests it under an emulator: the
# NEON kernels against the portable ones, the quantizers' bits against those of this machine's
# localds, which must be installed.
set -euo pipefail
cd "$(dirname "$0")"

for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake ninja; do
  command -v "$tool" > /dev/null && continue
  echo "no $tool: apt-get install g++-aarch64-linux-gnu qemu-user; pip install cmake ninja" >&2
  exit 1
done

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
# Linked statically, so that the emulator needs no Arm system around the program.
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static > "$build/log"
cmake --build "$build" -j2 >> "$build/log" || { cat "$build/log"; exit 1; }

# An emulator without dot products must fail, not leave the portable kernels alone.
LOCALDS_ISA=neon qemu-aarch64 "$build/compare_isas"
python3 compare_quantizers.py qemu-aarch64 "$build/quantize_stream"
