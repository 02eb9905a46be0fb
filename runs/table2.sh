#!/bin/bash
# Table 2, the user study, of the videos that table1.sh made: runs/table2.sh WORK
# Then `flowvqtalker evaluate study serve` shows it to people, and `study analyse` makes the table of their answers.
set -euo pipefail
work=$1
flowvqtalker evaluate study build ours="$work/table1/mead/animate" --real "$work/table1/mead/real" \
  -o "$work/study"
