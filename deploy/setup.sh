#!/bin/sh
# Makes what Prefect's server needs to know: pools, automations, deployments. Run it again after each change.
# Needs PREFECT_API_URL, where the server asks for it PREFECT_API_AUTH_STRING, and the three that prefect.yaml reads.
set -eu
# Prefect takes a variable that is not set for an empty text, and each run would fail.
: "${PREFECT_API_URL:?is not set: the address of the Prefect server, like http://127.0.0.1:4200/api}"
: "${PIXELMILL_STORE:?is not set: the store, see prefect.yaml}"
: "${PIXELMILL_IMAGES:?is not set: the images to predict, see prefect.yaml}"
: "${PIXELMILL_LABELLED:?is not set: the labelled images, see prefect.yaml}"
here=$(cd "$(dirname "$0")" && pwd)
type=${PIXELMILL_POOL_TYPE:-process} # process: machines and compose; kubernetes: jobs of a cluster

for pool in cpu gpu; do
    if [ "$type" = kubernetes ]; then
        prefect --no-prompt work-pool create "$pool" --type kubernetes --overwrite --base-job-template "$here/kubernetes/pool-$pool.json"
    else
        prefect --no-prompt work-pool create "$pool" --type "$type" --overwrite
    fi
done

# By name: creating one that is there would make a second.
for name in 'pixelmill crash the silent' 'pixelmill rerun crashed predict'; do
    if prefect automation inspect "$name" >/dev/null 2>&1; then
        prefect --no-prompt automation delete "$name"
    fi
done
prefect --no-prompt automation create --from-file "$here/automations.yaml"

if [ -f "$here/prefect.yaml" ]; then
    cd "$here/.." && prefect --no-prompt deploy --all --prefect-file "$here/prefect.yaml"
fi
