#!/usr/bin/env bash
# Start the cluster of local.yaml (or of the file that is given first) in the foreground. Ctrl-C ends it with all its nodes.
# Further words go to `ray start`; DASHBOARD_PORT is the dashboard's port.
set -euo pipefail
config=${1:-$(dirname "$0")/local.yaml}
address=$(sed -n 's/^ *gcs_address: *//p' "$config")
head_id=$(sed -n 's/^ *head_node_id: *//p' "$config")

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# What the provider and the second autoscaler read from the head's environment.
export RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1 RAY_CLOUD_INSTANCE_ID=$head_id RAY_OVERRIDE_NODE_ID_FOR_TESTING=$head_id
export AUTOSCALER_UPDATE_INTERVAL_S=1
# After so many seconds without a head, nodes end.
export RAY_gcs_rpc_server_reconnect_timeout_s=5
# Jobs wait so long for nodes that are not there yet.
export COLA_CLUSTER_PATIENCE_S=${COLA_CLUSTER_PATIENCE_S:-300}

port=${address#*:}
exec ray start --head --block --node-ip-address "${address%:*}" --port "$port" --ray-client-server-port "$((port + 1))" --num-cpus 0 --num-gpus 0 \
    --autoscaling-config "$config" --dashboard-host 127.0.0.1 --dashboard-port "${DASHBOARD_PORT:-8265}" "${@:2}"
