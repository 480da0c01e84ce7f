#!/usr/bin/env bash
# Start the stack, or give the arguments to pipeline-manager.sh; end everything when the container is stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -gt 0 ]; then exec ./pipeline-manager.sh "$@"; fi

trap './pipeline-manager.sh --stop; exit 0' TERM INT
./pipeline-manager.sh --start
# the supervisor restarts services that die; this only waits, in a way that a signal interrupts
while :; do
  sleep 3600 &
  wait $!
done
