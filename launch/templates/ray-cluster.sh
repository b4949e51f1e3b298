#!/usr/bin/env bash
# Starts a node of a Ray cluster for sharding, in the foreground. Ctrl-C, or SIGTERM, ends it.
#
#   ray-cluster.sh head [OPTION ...]               on one machine
#   ray-cluster.sh join HEAD:6379 [OPTION ...]     on each of the others
#
# Options are those of `ray start`, such as --num-cpus=8 or --port=6400. The libraries are installed once into
# ALPRO_VENV (~/.alpro-sharding unless set). Export what the workers need, such as AWS_ACCESS_KEY_ID, beforehand.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${ALPRO_VENV:-$HOME/.alpro-sharding}

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

# The mark is written last, so that an interrupted installation is done again.
install_libraries() {
    local requirements=$here/requirements-sharding.txt
    if ! cmp -s "$requirements" "$venv/installed-requirements.txt"; then
        "${PYTHON:-python3.11}" -m venv "$venv"
        "$venv/bin/pip" install --quiet -r "$requirements"
        cp "$requirements" "$venv/installed-requirements.txt"
    fi
}

start() {
    # Who reaches the ports of a cluster without a token can run anything on it.
    export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
    # So that `python` in a job's command is the one with the libraries.
    export PATH=$venv/bin:$PATH
    # Media never pass through Ray's object store; its default is 30 % of the memory.
    exec "$venv/bin/ray" start --block --object-store-memory=200000000 "$@"
}

case ${1:-} in
    head)
        shift
        install_libraries
        if [[ -z ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then
            "$venv/bin/ray" get-auth-token --generate >/dev/null
            echo "the cluster's token is in ~/.ray/auth_token: every node, and who submits jobs, needs a copy of it" >&2
        fi
        start --head "$@"
        ;;
    join)
        [[ $# -ge 2 ]] || usage
        address=$2
        shift 2
        install_libraries
        start --address="$address" "$@"
        ;;
    *)
        usage
        ;;
esac
