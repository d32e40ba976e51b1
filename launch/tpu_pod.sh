#!/usr/bin/env bash
# Run a saap job on all hosts of a TPU pod slice that exists, one process a host. See docs/scale.md.
#
#   TPU_NAME=my-slice ZONE=us-west4-a DIR=/mnt/shared/saap launch/tpu_pod.sh \
#     score mine.py --mesh.fsdp -1 --calibration.batch-size 16 --runs /mnt/shared/runs
#
# DIR: a checkout of this repository at the same path on every host, installed into DIR/.venv with jax's TPU libraries:
#   .venv/bin/pip install -q --no-deps -r requirements/base.lock && .venv/bin/pip install -q --no-deps -e . &&
#   .venv/bin/pip install -q "jax[tpu]"
# Models, texts and --runs lie on a file system that all hosts mount. A job that ended early goes on when the same
# command is given again; ATTEMPTS gives it again by itself.
set -euo pipefail
: "${TPU_NAME:?name of the TPU slice}" "${ZONE:?its zone}" "${DIR:?directory of saap_jax on every host}"
[ $# -gt 0 ] || { echo "usage: launch/tpu_pod.sh COMMAND [CONFIG] [--FIELD VALUE ...]" >&2; exit 2; }

printf -v words '%q ' "$@"
printf -v place '%q' "$DIR"
for attempt in $(seq "${ATTEMPTS:-1}"); do
  code=0
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker=all \
    --command "cd $place && exec .venv/bin/saap ${words}--distributed auto" || code=$?
  [ "$code" -eq 0 ] && exit 0
  echo "attempt $attempt of ${ATTEMPTS:-1} ended with code $code" >&2
  [ "$code" -eq 2 ] && exit 2  # bad input: the same again
done
exit "$code"
