#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Prints the first Python of at least 3.11 that can make virtual environments.
for python in python3 python python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "$python"
        exit 0
    fi
done
echo "meshwen needs Python 3.11 or newer, with venv; set PYTHON=/path/to/python" >&2
echo python3
