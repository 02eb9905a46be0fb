#!/bin/bash
# All weights of the paper, from MEAD, HDTF and FFHQ as their authors ship them:
#   runs/paper_weights.sh MEAD HDTF FFHQ WORK [CONFIGS]
# FFHQ: its 512x512 images. CONFIGS: configs/paper (default), or configs/toy to try the whole path in minutes.
# Everything resumes: start the same command again. DEVICES=4 trains on four GPUs.
set -euo pipefail
mead=$(realpath "$1") hdtf=$(realpath "$2") ffhq=$3 work=$4 configs=${5:-configs/paper}
weights=$(python -c 'import flowvqtalker.weights as w; print(w.folder(None))')
face_model=$weights/face_model.safetensors  # ours, in place of the paper's 3DMM, which may not be passed on
mkdir -p "$work/data"
ln -sfn "$mead" "$work/data/MEAD"
ln -sfn "$hdtf" "$work/data/HDTF"

# The people of the published test lists are never trained on.
mapfile -t test_people < <(python - <<'PYTHON'
import json
from importlib.resources import files

from flowvqtalker.data.layouts import hdtf_person

splits = files("flowvqtalker_eval") / "splits"
mead, hdtf = (json.loads((splits / f"{name}-test.json").read_text()) for name in ("mead", "hdtf"))
people = [f"MEAD_{who}" for who in mead["subjects"]]
people += [hdtf_person(*name.rpartition("_")[0].split("_", 1)) for name in hdtf["videos"]]
print(*sorted(set(people)), sep="\n")
PYTHON
)
flowvqtalker prepare --data "$work/data" --out "$work/shard" --model "$face_model" --tracks "$work/tracks" \
  --workers "$(nproc)" --held-out "${test_people[@]}"

train() {
  local stage=$1
  shift
  flowvqtalker train "$stage" --config "$configs/$stage.yaml" --out "$work/runs/$stage" --loop.devices "${DEVICES:-1}" \
    --resume "$@"
}
train codebook --data.images "$ffhq"
train vqig --data.shard "$work/shard" --data.codebook "$work/runs/codebook/weights.safetensors" \
  --data.face-model "$face_model"
train expflow --shards "$work/shard"
train poseflow --shards "$work/shard"

for stage in codebook vqig expflow poseflow; do
  flowvqtalker weights-add "$stage" "$work/runs/$stage" --folder "$work/weights" --data "MEAD, HDTF, FFHQ"
done
