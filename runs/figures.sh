#!/bin/bash
# Figs. 4 to 7, from the weights and videos of the other scripts: runs/figures.sh WORK
# ZOOM=none draws Fig. 4 without details, which need faces that a detector finds.
set -euo pipefail
work=$1
out=$work/figures
mkdir -p "$out"
video=$(find "$work/table1/mead/animate" -name '*.mp4' | sort | head -n 1)
real=$work/table1/mead/real/$(basename "$video")
flowvqtalker evaluate grid --method ours="$video" --real "$real" --zoom "${ZOOM:-mouth}" -o "$out/fig4.png"
flowvqtalker evaluate pose --motion real="$real" --speech "$real" --seeds 0 1 2 --weights "$work/weights" -o "$out/fig5.png"
flowvqtalker evaluate latent "$work/shard" --weights ours="$work/weights" -o "$out/fig6.png"
flowvqtalker evaluate ablation "$work/shard" --train --config "$work/runs/vqig/config.yaml" --runs "$work/runs/ablation" \
  --weights "$work/weights" -o "$out/fig7.png"
