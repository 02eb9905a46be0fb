#!/bin/bash
# Table 1 on the published test lists: runs/table1.sh MEAD HDTF WORK [more options of `evaluate run`]
set -euo pipefail
mead=$1 hdtf=$2 work=$3
shift 3
for name in mead hdtf; do
  flowvqtalker evaluate run --split "$name-test" --data "${!name}" --weights "$work/weights" -o "$work/table1/$name" "$@"
done
