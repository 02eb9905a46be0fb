#!/bin/bash
# The default weights, from the folder of data that docs/model_card.md describes:
#   runs/default_weights.sh DATA WHISPER WORK
# DATA holds clips.csv, faces.csv, mouths.csv, speech.csv, the folders of their files, and ravdess_au/. WHISPER: the folder of Whisper
# base (MIT) in CTranslate2's format and floating point, the teacher of the speech encoder. Every step resumes. Codebook and image
# generator take a day of one core; CODEBOOK=configs/gpu/codebook.yaml VQIG=configs/gpu/vqig.yaml trains them on a GPU in a quarter
# of an hour. STEPS=2 tries the whole path.
set -euo pipefail
data=$(realpath "$1") whisper=$2 work=$3
face_model=$work/weights/face_model.safetensors
shard=$work/shard
mkdir -p "$work"

train() {
  local stage=$1 config=$2
  shift 2
  flowvqtalker train "$stage" --config "$config" --out "$work/runs/$stage" --resume ${STEPS:+--loop.steps "$STEPS"} "$@"
}
add() {
  flowvqtalker weights-add "$1" "$2" --folder "$work/weights" --data "see docs/model_card.md"
}

# The face model is made of the tracks, and the shard of the face model: so tracks come first, fitted by the present model.
present=$(python -c 'import flowvqtalker.weights as w; print(w.folder(None))')/face_model.safetensors
flowvqtalker prepare --data "$data" --out "$work/first" --model "$present" --tracks "$work/tracks" --workers "$(nproc)"
[ -f "$work/runs/face-model/weights.safetensors" ] || flowvqtalker train face-model --config configs/face-model.yaml \
  --tracks "$work/tracks" --tables "$data/clips.csv" "$data/faces.csv" --out "$work/runs/face-model"
if [ ! -f "$work/prepared" ]; then  # the face model changes after it, which would make `prepare` start again
  flowvqtalker prepare --data "$data" --out "$shard" --model "$work/runs/face-model/weights.safetensors" \
    --tracks "$work/tracks" --workers "$(nproc)"
  touch "$work/prepared"
fi
flowvqtalker identity-split "$shard" "$work/runs/face-model/weights.safetensors"
add face_model "$work/runs/face-model"

train codebook "${CODEBOOK:-configs/codebook.yaml}" --region.shard "$shard"
add codebook "$work/runs/codebook"
train vqig "${VQIG:-configs/vqig.yaml}" --data.shard "$shard" --data.face-model "$face_model" \
  --data.codebook "$work/runs/codebook/weights.safetensors"
flowvqtalker train vqig --config configs/vqig-image-level.yaml --out "$work/runs/vqig-image-level" --resume \
  ${STEPS:+--loop.steps "$STEPS"} --data.shard "$shard" --data.face-model "$face_model" \
  --data.codebook "$work/runs/codebook/weights.safetensors" --data.start "$work/runs/vqig/weights.safetensors"
add vqig "$work/runs/vqig-image-level"

# The sync expert finds the lag of each clip, which the speech encoder and the flows need.
flowvqtalker prepare-mouths --data "$data" --shard "$shard"
train sync configs/sync.yaml --shards "$shard"
add sync "$work/runs/sync"
flowvqtalker sync-clips --shard "$shard" --weights "$work/weights"
[ -d "$work/speech" ] || flowvqtalker prepare-speech --shards "$shard" --recordings "$data" --teacher "$whisper" -o "$work/speech"
train speech configs/speech.yaml --sets "$work/speech" --whisper "$whisper"
add speech_encoder "$work/runs/speech"
train speech-live configs/speech-live.yaml --shards "$shard" --recordings "$data" --weights "$work/weights"
add speech_encoder_live "$work/runs/speech-live"
[ -f "$work/runs/voice-emotion/weights.safetensors" ] || flowvqtalker train voice-emotion --config configs/voice-emotion.yaml \
  --recordings "$data" --weights "$work/weights" --out "$work/runs/voice-emotion"
add voice_emotion "$work/runs/voice-emotion"

train expflow configs/expflow.yaml --shards "$shard" --face-model "$face_model" \
  --features.speech-encoder "$work/runs/speech" --retarget.action-units "$data/ravdess_au/clip_means.npz"
add expflow "$work/runs/expflow"
train poseflow configs/poseflow.yaml --shards "$shard" --features.speech-encoder "$work/runs/speech"
add poseflow "$work/runs/poseflow"
[ -f "$work/runs/motion-emotion/weights.safetensors" ] || flowvqtalker train motion-emotion \
  --config configs/motion-emotion.yaml --shards "$shard" --out "$work/runs/motion-emotion"
add motion_emotion "$work/runs/motion-emotion"
# Optional, needs openvino and nncf: the image generator in int8.
if python -c 'import nncf' 2>/dev/null; then
  python tools/compile_generator.py "$shard" --weights "$work/weights"
fi
