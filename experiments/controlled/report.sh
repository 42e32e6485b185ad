#!/usr/bin/env bash
# All sound arms on one page, each compared with its own base: experiments/controlled/report.sh OUT [SEEDS]
set -euo pipefail
out=$1
seeds=${2:-0 1 2 3 4}

join() { local IFS=,; echo "[$*]"; }

runs=()
for arm in dpo shuffled sft; do
  for seed in $seeds; do runs+=("$arm-$seed"); done
done
last=("${runs[@]/%//traces/step_000060}")
first=("${runs[@]/%//traces/step_000000}")
last=("${last[@]/#/$out/}")
first=("${first[@]/#/$out/}")
spinal compare model.trace="${last[0]}" reference.trace="${first[0]}" others="$(join "${last[@]:1}")" \
  other_references="$(join "${first[@]:1}")" names="$(join "${runs[@]}")" hydra.run.dir="$out/ranked" overwrite=true
