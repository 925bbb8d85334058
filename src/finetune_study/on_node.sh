# Run by srun, once on each node of a run: bash on_node.sh '<words that call Python>' ARGUMENTS...
# SLURM signals the first process of a step alone, which is this shell. It passes the signal on to all of the command,
# which may be several processes (modules, conda), and waits for their end.
words=$1
shift
call() { eval "$words" '"$@"'; }
set -m # the command has a process group of its own
call "$@" &
command=$!
set +m
ending=
trap 'ending=yes; kill -TERM -- "-$command" 2> /dev/null' TERM INT HUP
while :; do
    wait "$command"
    status=$?
    kill -0 "$command" 2> /dev/null || break
done
# A trap ends `wait` early; the status of a child that ended meanwhile is asked once more.
if [ -n "$ending" ]; then
    wait "$command"
    status=$?
    while kill -0 -- "-$command" 2> /dev/null; do sleep 0.1; done
fi
exit "$status"
