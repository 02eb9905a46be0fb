#!/bin/bash
# Figs. 4 to 7, from the weights and videos of the other scripts: runs/figures.sh WORK [CONFIGS]
set -euo pipefail
work=$1 configs=${2:-configs/paper}
out=$work/figures
mkdir -p "$out"
video=$(find "$work/table1/mead/animate" -name '*.mp4' | sort | head -n 1)
real=$work/table1/mead/real/$(basename "$video")
flowvqtalker evaluate grid --method ours="$video" --real "$real" -o "$out/fig4.png"
flowvqtalker evaluate pose --motion real="$real" --motion ours="$video" -o "$out/fig5.png"
flowvqtalker evaluate latent "$work/shard" --weights ours="$work/weights" -o "$out/fig6.png"
flowvqtalker evaluate ablation "$work/shard" --train --config "$configs/vqig.yaml" --runs "$work/runs/ablation" \
  --weights "$work/weights" -o "$out/fig7.png"
