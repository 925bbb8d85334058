#!/usr/bin/env bash
# A SLURM cluster for tests, on one Debian machine: real daemons and real accounting; its nodes share this machine, and
# their GPUs are device nodes with nothing behind them.
#
#   cluster.sh up        start it, or what is missing of it; installs the Debian packages if need be
#   cluster.sh down      stop it and remove its configuration and state; the packages stay
#   cluster.sh status    exit 0 if it is up and answers, 1 if not
#   cluster.sh why-not   say in one line why it can't be had here, and exit 1; silent and 0 where it can
#
#   cluster.sh stop-node a100-2    lose a node: its slurmd, its slurmstepd and all processes of its jobs are killed, and
#                                  nobody is told; slurmctld finds out in 10 to 20 s, and the node is then down*
#   cluster.sh start-node a100-2   have it back
#   cluster.sh stop-daemon slurmdbd|slurmctld     lose a daemon (jobs go on)
#   cluster.sh start-daemon slurmdbd|slurmctld    have it back
#
# Partitions a100 (the default one) and v100 of two nodes each, each node with 16 CPUs and eight GPUs; accounts lab (the
# default one of root) and other. Limits of accounts and QOS are enforced, and a job above its --mem is really killed.
#
# The configuration has to lie in /etc/slurm, because some tools drop SLURM_CONF from the environment of jobs. A file or
# a daemon of another cluster is never touched: where there is one, the script refuses and exits with 3. All state is
# under $state. Everything, slurmctld and slurmdbd too, runs as root: good for a test, for nothing else.
# Tried with cgroup v1; written for v2 as well.

set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

etc=/etc/slurm
state=/var/lib/finetune-study-test-cluster
nodes=(a100-1 a100-2 v100-1 v100-2)
packages=(slurm-wlm slurm-wlm-mysql-plugin slurmdbd munge mariadb-server)
configs=("$etc"/{slurm,gres,cgroup,slurmdbd}.conf)
marker="# Written by finetune-study, tests/slurm/cluster.sh: removed again by 'cluster.sh down'."

fail() { # MESSAGE [EXIT STATUS]
    echo "cluster.sh: $1" >&2
    exit "${2:-1}"
}

wait_for() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || fail "gave up waiting until $what; the logs are in $state/log"
        sleep 0.1
    done
}

# --- processes: a daemon is ours if one of our pid files names it ---

alive() { # PID PROGRAM: a zombie has no exe
    [[ $(cat "/proc/$1/comm" 2>/dev/null) == "$2" && -n $(readlink "/proc/$1/exe") ]]
}

running() { # NAME [PROGRAM]: prints its pid
    local pid
    pid=$(cat "$state/run/$1.pid" 2>/dev/null) && alive "$pid" "${2:-$1}" && echo "$pid"
}

gone() { ! running "$@"; }

detached() { # COMMAND...: in a session of its own, with a clean environment, without our lock (9)
    setsid --fork env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 "$@" </dev/null >>"$state/log/start.log" 2>&1 9>&-
}

stop() { # NAME
    local pid
    pid=$(running "$1") || return 0
    kill "$pid"
    wait_for 60 "$1 has stopped" gone "$1"
}

# --- where it can't be had ---

foreign() { # says in one line what of another cluster is in the way; fails if nothing is
    local file pid parent
    if [[ ${SLURM_CONF:-$etc/slurm.conf} != "$etc/slurm.conf" ]]; then
        echo "SLURM_CONF names another cluster's configuration, $SLURM_CONF: unset it, or use another machine"
        return
    fi
    for file in "${configs[@]}" /run/slurm/conf/slurm.conf; do
        if [[ -e $file ]] && ! grep -qxF "$marker" "$file"; then
            echo "$file is another cluster's configuration: move it away, or use another machine"
            return
        fi
    done
    while read -r pid; do # a child of ours bears that name too for a moment
        parent=$(awk '/^PPid/ {print $2}' "/proc/$pid/status" 2>/dev/null) || continue
        if alive "$pid" slurmctld && ! grep -qsxE "$pid|$parent" "$state/run/slurmctld.pid"; then
            echo "process $pid is another cluster's slurmctld: stop it, or use another machine"
            return
        fi
    done < <(grep -lsx slurmctld /proc/[0-9]*/comm | cut -d / -f 3)
    return 1
}

cgroup_version() {
    if [[ -w /sys/fs/cgroup/memory/cgroup.procs && -w /sys/fs/cgroup/freezer/cgroup.procs ]]; then
        echo v1
    else
        [[ -w /sys/fs/cgroup/cgroup.procs ]] && grep -qw memory /sys/fs/cgroup/cgroup.controllers && echo v2
    fi
}

why_not() { # says in one line why the cluster can't be had; fails if it can
    if ((EUID != 0)); then
        echo "the test cluster needs root, and this is user $(id -un): run it as root, in a container for example"
    elif [[ ! -e /etc/debian_version ]] || ! command -v apt-get >/dev/null; then
        echo "the test cluster is made of Debian's packages, and there is no apt-get here: use Debian 12"
    elif ! cgroup_version >/dev/null; then
        echo "the test cluster needs cgroups with the memory controller, writable at /sys/fs/cgroup: mount them there"
    elif [[ -z $(hostname -I) ]]; then
        echo "the test cluster needs a network address beside the loopback, or SLURM resolves no name: give it one"
    else
        foreign
    fi
}

# --- packages and configuration ---

install_packages() {
    local install=(apt-get -q -y install --no-install-recommends "${packages[@]}") log
    # shellcheck disable=SC2016 # it is dpkg-query that fills in ${Status}
    [[ $(dpkg-query -W -f '${Status}\n' "${packages[@]}" 2>&1 | grep -vc '^install ok installed') != 0 ]] || return 0
    export DEBIAN_FRONTEND=noninteractive
    log=$("${install[@]}" 2>&1 9>&-) || log=$(apt-get -q update 2>&1 && "${install[@]}" 2>&1 9>&-) ||
        fail "could not install ${packages[*]}: $(tail -n 3 <<<"$log")"
}

configure() {
    local node weight gpu port=17001 minor=0 host version
    host=$(hostname -s)
    version=$(cgroup_version)
    mkdir -p "$etc" "$state"/{run,log,spool,slurmctld}
    cat >"$etc/slurm.conf" <<CONF
$marker
ClusterName=finetune-study-test
SlurmctldHost=$host(127.0.0.1)
StateSaveLocation=$state/slurmctld
SlurmctldPidFile=$state/run/slurmctld.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdSpoolDir=$state/spool/%n
SlurmdPidFile=$state/run/%n.pid
SlurmdLogFile=$state/log/%n.log
# What the nodes claim holds, not what the machine has.
SlurmdParameters=config_overrides
# task/cgroup makes --mem a limit; by the cgroups of proctrack/cgroup stop-node finds what it has to kill.
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# Without it a job that names no memory would get all that its node has.
DefMemPerCPU=500
# A lost node is noticed soon (one that refuses connections is tried for MessageTimeout, twice), and may come back.
MessageTimeout=5
SlurmdTimeout=10
ReturnToService=2
KillWait=5
# The machine may be busy with what the jobs do: a job that takes long to start is not lost.
BatchStartTimeout=60
# Small jobs start at once.
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,default_queue_depth=500,bf_interval=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
PartitionName=a100 Nodes=a100-[1-2] MaxTime=2-00:00:00 Default=YES
PartitionName=v100 Nodes=v100-[1-2] MaxTime=2-00:00:00
# Two kinds of GPU behind one name; SLURM gives v100-2 first.
PartitionName=mixed Nodes=v100-2,a100-2 MaxTime=2-00:00:00
CONF
    echo "$marker" >"$etc/gres.conf"
    for node in "${nodes[@]}"; do
        [[ $node == v100* ]] && weight=1 || weight=2
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port++)) CPUs=16 Sockets=1" \
            "CoresPerSocket=16 ThreadsPerCore=1 RealMemory=32000 Gres=gpu:${node%-*}:8 Weight=$weight" >>"$etc/slurm.conf"
        echo "NodeName=$node AutoDetect=off Name=gpu Type=${node%-*} File=$state/gpus/$node/gpu[0-7]" >>"$etc/gres.conf"
        mkdir -p "$state/gpus/$node"
        for gpu in "$state/gpus/$node"/gpu{0..7}; do # SLURM wants a device; 60 is for local use, and has no driver
            [[ -e $gpu ]] || mknod "$gpu" c 60 "$minor"
            minor=$((minor + 1))
        done
    done
    {
        printf '%s\n' "$marker" "CgroupPlugin=cgroup/$version" ConstrainRAMSpace=yes ConstrainSwapSpace=yes
        [[ $version == v1 ]] || echo IgnoreSystemd=yes
    } >"$etc/cgroup.conf"
    rm -f "$etc/slurmdbd.conf"
    (umask 077 && printf '%s\n' "$marker" AuthType=auth/munge DbdHost=localhost \
        "PidFile=$state/run/slurmdbd.pid" "LogFile=$state/log/slurmdbd.log" StorageType=accounting_storage/mysql \
        StorageHost=localhost StorageUser=root StorageLoc=slurm >"$etc/slurmdbd.conf")
}

# --- daemons: each start returns when the daemon answers ---

start_munged() {
    munge -n >/dev/null 2>&1 && return # ours, or the machine's own
    install -d -o munge -g munge /run/munge "$state/munge"
    detached runuser -u munge -- munged --force --pid-file="$state/munge/pid" --log-file="$state/munge/log" \
        --seed-file="$state/munge/seed"
    ln -sf ../munge/pid "$state/run/munged.pid"
    wait_for 10 "munged answers" munge -n
}

start_mariadbd() { # our own, without a port; Debian's is left alone
    local data=$state/database
    if [[ ! -e $state/run/mariadbd.pid ]]; then
        rm -rf "$data" && install -d -o mysql -g mysql "$data"
        mariadb-install-db --no-defaults --user=mysql --datadir="$data" --skip-test-db \
            --auth-root-authentication-method=socket >>"$state/log/start.log" 2>&1 9>&-
    fi
    gone mariadbd >/dev/null &&
        detached mariadbd --no-defaults --user=mysql --datadir="$data" --socket="$data/socket" --skip-networking \
            --pid-file="$data/pid" --log-error="$data/log" --innodb-buffer-pool-size=64M \
            --innodb-log-file-size=32M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0
    ln -sf ../database/pid "$state/run/mariadbd.pid"
    wait_for 30 "mariadbd answers" mariadb-admin --no-defaults --socket="$data/socket" ping
}

start_slurmdbd() {
    running slurmdbd >/dev/null || detached MYSQL_UNIX_PORT="$state/database/socket" slurmdbd
    wait_for 60 "slurmdbd answers" sacctmgr -n list cluster
}

start_slurmctld() {
    running slurmctld >/dev/null || detached slurmctld
    wait_for 30 "slurmctld answers" scontrol ping
}

usable() { # NODE...
    local node
    for node; do
        running "$node" slurmd && [[ $(sinfo -hN -n "$node" -o %T | sort -u) =~ ^(idle|mixed|allocated|completing)$ ]] || return 1
    done
}

start_nodes() { # NODE...
    local node
    for node; do running "$node" slurmd >/dev/null || detached slurmd -N "$node"; done
    wait_for 60 "the nodes $* are usable" usable "$@"
}

stop_node() { # NODE
    local of_node=(/sys/fs/cgroup \( -path "*/slurm_$1*" -o -path "*/$1_slurmstepd.scope*" \)) pid pids stepds
    if pid=$(running "$1" slurmd); then kill -KILL "$pid"; fi
    while true; do # 0 is a process outside of our container
        mapfile -t pids < <(find "${of_node[@]}" -name cgroup.procs -exec grep -hxv 0 {} + 2>/dev/null)
        ((${#pids[@]})) || break
        stepds=()
        for pid in "${pids[@]}"; do if alive "$pid" slurmstepd; then stepds+=("$pid"); fi; done
        # slurmstepd before its job, or it would report the job's end.
        kill -KILL "${stepds[@]}" "${pids[@]}" 2>/dev/null || true
        sleep 0.1
    done
    find "${of_node[@]}" -depth -type d -exec rmdir {} + 2>/dev/null || true
}

# --- the cluster ---

answers() {
    ! why_not && [[ -e ${configs[0]} ]] && running slurmctld && scontrol ping && sacctmgr -n list cluster
}

up() {
    if answers >/dev/null 2>&1 && usable "${nodes[@]}" >/dev/null; then
        echo "cluster.sh: the test cluster is up already"
        return
    fi
    install_packages
    configure
    start_munged
    start_mariadbd
    start_slurmdbd
    if [[ -z $(sacctmgr -n list assoc user=root account=other) ]]; then
        { sacctmgr -i add cluster finetune-study-test && sacctmgr -i add account lab,other &&
            sacctmgr -i add user root account=lab,other defaultaccount=lab; } >>"$state/log/start.log" 2>&1 ||
            fail "sacctmgr could not add the accounts; see $state/log/start.log"
    fi
    start_slurmctld
    start_nodes "${nodes[@]}"
    wait_for 30 "sbatch would take a job" sbatch --test-only --wrap true
    wait_for 30 "sacct answers" sacct
    echo "cluster.sh: the test cluster is up: ${nodes[*]}"
}

down() {
    local name
    [[ -d $state ]] || return 0
    for name in "${nodes[@]}"; do stop_node "$name"; done
    for name in slurmctld slurmdbd mariadbd munged; do stop "$name"; done
    for name in "${configs[@]}"; do
        if grep -qsxF "$marker" "$name"; then rm "$name"; fi
    done
    rmdir /run/munge 2>/dev/null || true # not that of a munged that runs
    rm -rf "$state"
}

command=${1:-} name=${2:-}
exec 9</var/lib # one cluster.sh at a time
flock 9
if [[ $command =~ ^up$|-(node|daemon)$ ]] && refusal=$(why_not); then fail "$refusal" 3; fi
[[ ! $command =~ -(node|daemon)$ || -e ${configs[0]} ]] || fail "the test cluster is not up: run cluster.sh up"
case "$command $name" in
"up ") up ;;
"down ") if ((EUID == 0)); then down; else fail "down needs root, and this is user $(id -un)"; fi ;;
"status ") answers >/dev/null 2>&1 ;;
"why-not ") if why_not; then exit 1; fi ;;
"stop-node "[av]100-[12]) stop_node "$name" ;;
"start-node "[av]100-[12]) start_nodes "$name" ;;
"stop-daemon slurmdbd" | "stop-daemon slurmctld") stop "$name" ;;
"start-daemon slurmdbd") start_slurmdbd ;;
"start-daemon slurmctld")
    start_slurmctld
    wait_for 60 "slurmctld knows its nodes" eval '! sinfo -hN -o %T | grep unk'
    ;;
*) fail "usage: cluster.sh up|down|status|why-not, (stop|start)-node NODE, (stop|start)-daemon slurmdbd|slurmctld" 2 ;;
esac
