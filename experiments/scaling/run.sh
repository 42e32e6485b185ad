#!/usr/bin/env bash
# The scaling study from nothing to tables and figures: experiments/scaling/run.sh small|full
# Complete runs are passed over and one that was cut off goes on, so start it again after any interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PWD/.venv/bin:$PATH
case ${1:-} in
  small) sweep=runs/scaling_small studies=(scaling_small) ;;
  full) sweep=runs/scaling studies=(scaling scaling_beta scaling_rate) ;;
  *) echo "usage: experiments/scaling/run.sh small|full" >&2; exit 2 ;;
esac
export JAX_COMPILATION_CACHE_DIR=$PWD/$sweep/.compiled # runs of one size are compiled once
for study in "${studies[@]}"; do
  spinal train experiment="$study"
done
spinal collect "$sweep"
python experiments/scaling/analyse.py "$sweep" "experiments/scaling/$1"
