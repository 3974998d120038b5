#!/bin/sh
# Pools, limit, automation and deployments on the server at PREFECT_API_URL; can be run again after a change.
# Wants MSIF_NAME, MSIF_CONFIG, MSIF_HOME and MSIF_CRON (see prefect.yaml). ACCELERATORS is how many there are (1).
set -eu
: "${MSIF_NAME:?what the deployments are called}" "${MSIF_CONFIG:?path of the configuration}"
: "${MSIF_HOME:?folder that relative paths start at}" "${MSIF_CRON:?when to rebuild, in UTC}"
cd "$(dirname "$0")/.."
for pool in gpu cpu; do
    prefect --no-prompt work-pool create "$pool" --type process --overwrite
done
prefect --no-prompt concurrency-limit create accelerator "${ACCELERATORS:-1}"
prefect automation inspect "msif zombies" >/dev/null 2>&1 ||
    prefect --no-prompt automation create --from-file deployments/automations.yaml
prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml
