#!/usr/bin/env bash
# The dynamics study from nothing to tables and figures: experiments/dynamics/run.sh FILE.jsonl.gz
# Complete runs are passed over and one that was cut off goes on, so start it again after any interruption.
set -euo pipefail
[ $# = 1 ] || { echo "usage: experiments/dynamics/run.sh FILE.jsonl.gz" >&2; exit 2; }
pairs=$(realpath "$1")
cd "$(dirname "$0")/../.."
export PATH=$PWD/.venv/bin:$PATH
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 # huge pages: faster on a CPU
spinal train experiment=dynamics preferences.path="$pairs"
spinal collect runs/dynamics
python experiments/dynamics/analyse.py runs/dynamics experiments/dynamics
