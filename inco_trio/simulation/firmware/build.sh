#!/bin/sh
# Build core1.elf: ./build.sh [OUTPUT]
#
# The same compiler makes the same bytes, wherever and whenever: no debugging information, no build id, no paths.
# Debian's packages: gcc-riscv64-linux-gnu (which brings binutils-riscv64-linux-gnu).
set -eu
output=$(realpath -- "${1:-$(dirname -- "$0")/core1.elf}")
cd -- "$(dirname -- "$0")"
riscv64-linux-gnu-gcc -std=c11 -Os -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-stack-protector \
    -fno-asynchronous-unwind-tables -ffunction-sections -fno-tree-loop-distribute-patterns \
    -march=rv64imac_zicsr -mabi=lp64 -mcmodel=medany \
    -nostdlib -static -no-pie -s -Wl,--build-id=none,--no-warn-rwx-segments,--gc-sections,--nmagic \
    -T core1.ld -o "$output" start.S core1.c
chmod 644 "$output"
