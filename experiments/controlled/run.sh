#!/usr/bin/env bash
# Bases of the controlled world and what four ways of training make of each: experiments/controlled/run.sh OUT [SEEDS]
# Runs that are complete are passed over, one that was cut off goes on.
set -euo pipefail
out=$1
seeds=${2:-0 1 2 3 4}

run() { # folder, settings...
  local folder=$1
  shift
  [ -e "$folder/manifest.json" ] || spinal train "$@" hydra.run.dir="$folder" > "$folder.log" 2>&1
}

mkdir -p "$out"
for seed in $seeds; do
  base=$out/base-$seed
  run "$base" experiment=world_base model.source=random:0.3m@"$seed" seed="$seed"
  dpo="experiment=world_dpo model.source=$base/model seed=$seed preferences.seed=0"
  run "$out/dpo-$seed" $dpo
  run "$out/shuffled-$seed" $dpo preferences.shuffle_labels=true preferences.seed="$seed"
  run "$out/sft-$seed" $dpo objective=sft
  run "$out/hot-$seed" $dpo optimizer.learning_rate=5e-3
done
