#!/bin/bash
#SBATCH @options@
#
# The run @name@: start Ray on the nodes of this job, and vimscale launch on that Ray (docs/clusters.md).

job=@folder@
touch "$job/began"
cat > "$job/recipe.yaml" << 'END_OF_RECIPE'
@recipe@
END_OF_RECIPE

# srun would pass on only the variables that sbatch's --export names
export SLURM_EXPORT_ENV=ALL
RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
# a node whose Ray gets a SIGTERM counts as taken away: the run saves, and then that Ray ends
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=@grace@
@environment@

# two jobs may share a node: use ports below those that the system assigns, and separate folders
port=$((20000 + SLURM_JOB_ID % 1200 * 10))
export temporary="/tmp/vimscale-$SLURM_JOB_ID"

read -r -d '' on_node << 'END_OF_SETUP'
@setup@
exec "$@"
END_OF_SETUP
# Ray leaves its folder behind and opens it to every user of the node: put it into a folder that only this user can open
read -r -d '' ray_on_node << 'END_OF_NODE'
if ! mkdir -m 700 "$temporary" 2> /dev/null && [ ! -O "$temporary" ]; then
    echo "$temporary cannot be made, or belongs to another user" >&2
    exit 1
fi
trap 'kill "$!"' TERM
"$@" > /dev/null &
wait "$!"
wait "$!"
rm -rf "$temporary"
END_OF_NODE
step=(@step@)
start_ray() {
    local nodes=("${@:1:3}")
    "${step[@]}" "${nodes[@]}" bash -c "$on_node" node bash -c "$ray_on_node" ray ray start "${@:4}" @ray@ &
    steps+=("$!")
}

# the signal is Slurm's notice before the time limit, a preemption, or `vimscale stop`
stop_requested=
launcher=
# shellcheck disable=SC2329 # the trap calls it
request_stop() {
    stop_requested=yes
    [ -z "$launcher" ] || kill -USR1 "$launcher"
}
trap request_stop USR1 TERM

head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(@address@)"
steps=()
agent=$((port + 2))
start_ray --nodes=1 --ntasks=1 --nodelist="$head" --head --node-ip-address="$address" --port="$port" \
    --ray-client-server-port=$((port + 1)) --dashboard-agent-listen-port="$agent" --include-dashboard=false \
    --temp-dir="$temporary/r"
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
    start_ray --nodes="$others" --ntasks="$others" --exclude="$head" --address="$address:$port" \
        --dashboard-agent-listen-port="$agent"
fi

on_head=(@on_head@)
export RAY_ADDRESS="$address:$port"
wait_for="from vimscale.launch.processes import ray_connection
ray_connection.wait_for_nodes('$RAY_ADDRESS', $SLURM_JOB_NUM_NODES)"
"${on_head[@]}" bash -c "$on_node" node python3 -c "$wait_for"
code=$?
if [ -n "$stop_requested" ]; then
    code=3
elif [ "$code" = 0 ]; then
    "${on_head[@]}" bash -c "$on_node" node @launch@ &
    launcher=$!
    # a signal ends `wait` early
    while wait "$launcher"; kill -0 "$launcher" 2> /dev/null; do :; done
    wait "$launcher"
    code=$?
    launcher=
fi
kill "${steps[@]}"
wait

# Code 3 means stopped with a checkpoint. After a request to stop, every code but 0 (finished) and 2 (wrong recipe)
# means that there was no time to save: the run resumes from the checkpoint before.
if [ -n "$stop_requested" ] && [ "$code" != 0 ] && [ "$code" != 2 ]; then code=3; fi
if [ "$code" = 3 ] && [ ! -e "$job/stop" ] && scontrol requeue "$SLURM_JOB_ID"; then exit 3; fi
echo "$code" > "$job/ended"
exit "$code"
