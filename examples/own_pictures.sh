#!/usr/bin/env bash
# Train on your own pictures: a folder with a subfolder per class, or a .zip or .tar of one.
#
#   examples/own_pictures.sh PICTURES OUT [--section.key value ...]     the options are passed to maskalign train
set -euo pipefail
PICTURES=${1:?usage: own_pictures.sh PICTURES OUT [--section.key value ...]}
OUT=${2:?usage: own_pictures.sh PICTURES OUT [--section.key value ...]}
shift 2

maskalign data build "$PICTURES" --out "$OUT/data" --size 32
maskalign data encode --data "$OUT/data" --teacher efficientnet-lite0 --normalize mean
maskalign data show "$OUT/data" --out "$OUT/contact_sheet.png"
maskalign train --config quickstart --data.path "$OUT/data" --run_dir "$OUT/run" "$@"
maskalign sample "$OUT/run" --out "$OUT/samples" --cfg-scale 2
