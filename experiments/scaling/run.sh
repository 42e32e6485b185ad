#!/usr/bin/env bash
# The scaling study from nothing to tables and figures: [JOBS=2] experiments/scaling/run.sh small|full|slow|large
# Complete runs are passed over and one that was cut off goes on, so start it again after any interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PWD/.venv/bin:$PATH
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 # huge pages: faster on a CPU
bases=()
case ${1:-} in
  small) sweep=runs/scaling_small studies=(scaling_small) ;;
  full) sweep=runs/scaling studies=(scaling scaling_beta scaling_rate) ;;
  slow) sweep=runs/scaling_slow studies=(scaling_slow) bases=(optimizer.learning_rate=1e-3) ;;
  large) sweep=runs/scaling_large studies=(scaling_large) ;;
  *) echo "usage: experiments/scaling/run.sh small|full|slow|large" >&2; exit 2 ;;
esac
jobs=${JOBS:-2}
export JAX_COMPILATION_CACHE_DIR=$PWD/$sweep/.compiled # runs of one size are compiled once
export NPROC=$(( ($(nproc) + jobs - 1) / jobs ))        # threads of XLA in each process, where it runs on a CPU
parallel=(hydra/launcher=joblib hydra.launcher.n_jobs="$jobs")
spinal train experiment="${studies[0]}" +arm=base "${bases[@]}" "${parallel[@]}" # all others begin with these
for study in "${studies[@]}"; do
  spinal train experiment="$study" "${parallel[@]}"
done
spinal collect "$sweep"
python experiments/scaling/analyse.py "$sweep" "experiments/scaling/$1"
