#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Seconds from the start of the process to the first token on stdout, with a warm compilation cache.
#
#     benchmarks/startup.sh MODEL [FLAG ...]
#
# Runs `meshwen generate` twice with one new token, and prints the second run's time.
set -eu
model=$1
shift
meshwen generate "Hello" --model "$model" --max-new-tokens 1 "$@" >/dev/null 2>&1
/usr/bin/env time -f '%e s to the first token, %M KiB peak' \
    meshwen generate "Hello" --model "$model" --max-new-tokens 1 "$@"
