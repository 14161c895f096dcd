#!/usr/bin/env bash
# What a GPU makes of this project: 8 minutes on one H100, no internet, random weights.
#   bash tests/gpu.sh                      every part, the most valuable first
#   bash tests/gpu.sh attention toy        these parts
#   bash tests/gpu.sh --tiny               all of it on a CPU, in a minute, so that it cannot rot
# Each part prints a line of JSON as it ends, and appends it to the file of --out.
cd "$(dirname "$0")/.." && exec python3 -u -m tests.gpu "$@"
