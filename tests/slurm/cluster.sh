#!/usr/bin/env bash
# A real SLURM cluster of several nodes on one machine, for the tests.
#
#   eval "$(tests/slurm/cluster.sh up -n 2 -g 2 --watch $$)"     exports SLURMLAB_DIR, SLURM_CONF and PATH
#   tests/slurm/cluster.sh up [DIR] [-n NODES] [-c CPUS] [-g GPUS] [-p cgroup|linuxproc|pgid] [--watch PID] [--opt LINE]…
#   tests/slurm/cluster.sh env                     the same exports again
#   tests/slurm/cluster.sh exec [-H HOST] [-u USER] [--] COMMAND…     in a host, login if not said otherwise
#   tests/slurm/cluster.sh fail NODE               power off: SIGKILL for all that runs there
#   tests/slurm/cluster.sh start HOST              power on, or start daemons that are missing
#   tests/slurm/cluster.sh kill-slurmd NODE        the daemon alone; its tasks live on
#   tests/slurm/cluster.sh net NODE up|down        plug or pull the network cable
#   tests/slurm/cluster.sh wait JOB [SECONDS]      until it ends; prints "STATE code:signal restarts"; 124 if it is late
#   tests/slurm/cluster.sh down [DIR]              stop everything and remove DIR
#
# Each host (login, node1…) is a set of Linux namespaces with its own network (10.99.0.x on a bridge that only they
# see), name, process tree, /run, /dev/shm, /srv and munged; the rest of the file system is shared, as on a cluster
# with a shared one. login runs slurmctld and owns the bridge, the nodes run slurmd and, where it is installed, sshd.
# The machine's own network, mounts and control groups stay as they are, and several clusters can run at once.
#
# Namespaces instead of several slurmd on one host: only so can a node lose its power or its network, and have a port,
# a /dev/shm and a process tree of its own. The price is root (CAP_SYS_ADMIN, CAP_NET_ADMIN). DIR is $SLURMLAB_DIR or
# new; --watch ends the cluster with that process, so that a test run that crashed leaves nothing; --opt replaces a line
# of slurm.conf. -g gives each node so many GPUs that are not there: SLURM counts and hands them out as real ones.
# Debian's packages: slurm-wlm munge iproute2 util-linux procps, and for ssh between nodes openssh-server.
set -euo pipefail
umask 022
PROG=$(readlink -f "$0")
NET=10.99.0
ENDED='^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|PREEMPTED|BOOT_FAIL|DEADLINE|OUT_OF_MEMORY|SPECIAL_EXIT)$'

say() { echo "cluster.sh: $*" >&2; }
die() { say "$@"; exit 1; }
load() { # DIR: NODES CPUS GPUS PROCTRACK TAG
    [ -r "$1/cluster.vars" ] || die "there is no cluster in $1"
    # shellcheck source=/dev/null
    . "$1/cluster.vars"
}

# ------------------------------------------------------------------------------------------------------ inside a host

host_init() { # DIR NAME: the first process of a host
    local dir=$1 name=$2 nd=$1/nodes/$2
    load "$dir"
    hostname "$name"
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -p /run/sshd /run/lock /run/munge
    echo "$name" >/run/slurmlab.host # tells the commands in bin/ that they are inside
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    if [ -d /srv ]; then mount -t tmpfs -o mode=1777 tmpfs /srv; fi
    mount --bind "$dir/etc" /etc/slurm
    mount --bind "$dir/etc/hosts" /etc/hosts
    if [ -e /etc/resolv.conf ]; then mount --bind "$dir/etc/resolv.conf" "$(readlink -f /etc/resolv.conf)"; fi
    if [ -e /etc/ssh/ssh_config ]; then mount --bind "$dir/etc/ssh_config" /etc/ssh/ssh_config; fi
    if [ "$PROCTRACK" = cgroup ]; then # the host's own root in the freezer, which proctrack/cgroup uses
        mkdir -p /run/cg0 /run/cg/freezer
        mount -t cgroup -o freezer cgroup /run/cg0
        mkdir -p "/run/cg0/$TAG/$name"
        mount --bind "/run/cg0/$TAG/$name" /run/cg/freezer
        umount /run/cg0
    fi
    if [ "$name" != login ]; then # one path of munge's socket everywhere, another munged behind it
        mkdir -p "$nd/munge"
        mount --bind "$nd/munge" "$dir/munge"
    fi
    mount --bind "$dir/munge" /run/munge
    echo 1 2>/dev/null >/proc/sys/net/ipv6/conf/all/disable_ipv6 || true
    ip link set lo up
    touch "$nd/ready"
    until [ -e "$nd/go" ]; do sleep 0.02; done # the network is there
    host_daemons "$dir" "$name"
    touch "$nd/started"
    trap : TERM INT HUP USR1 USR2
    while :; do sleep 3600 & wait $! || true; done # adopt orphans
}

host_daemons() { # DIR NAME: start what does not run
    local dir=$1 name=$2 nd=$1/nodes/$2 daemon=slurmd
    export SLURM_CONF=$dir/etc/slurm.conf
    if ! pgrep -x munged >/dev/null; then
        rm -f "$dir"/munge/munge.socket.2*
        munged --key-file="$dir/munge.key" --socket="$dir/munge/munge.socket.2" --pid-file="$nd/munged.pid" \
            --seed-file="$nd/munged.seed" --log-file="$dir/log/munged.$name.log" --num-threads=2
    fi
    [ "$name" != login ] || daemon=slurmctld
    pgrep -x $daemon >/dev/null || $daemon
    if [ -e "$dir/etc/sshd_config" ] && ! pgrep -x sshd >/dev/null; then
        /usr/sbin/sshd -f "$dir/etc/sshd_config" -E "$dir/log/sshd.$name.log"
    fi
}

# ------------------------------------------------------------------------------------------------------- from outside

hosts_of() { local i; echo login; for ((i = 1; i <= NODES; i++)); do echo "node$i"; done; }
ip_of() { if [ "$1" = login ]; then echo $NET.1; else echo $NET.$((10 + ${1#node})); fi; }

born() { # PID: when it started; fails where it is gone, or dead and not collected yet
    local stat fields
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
    read -ra fields <<<"${stat##*) }"
    [ "${fields[0]}" != Z ] && echo "${fields[19]}"
}
holder() { # DIR NAME: the process that holds a host's namespaces, while it lives
    local pid time
    read -r pid time 2>/dev/null <"$1/nodes/$2/holder" || return 1
    [ "$(born "$pid")" = "$time" ] || return 1
    echo "$pid"
}
init_of() { # DIR NAME: the host's first process, as seen from here
    local pid
    pid=$(holder "$1" "$2") || return 1
    pid=$(pgrep -P "$pid" | head -n 1)
    # The holder is unshare, or a shell that waits for it: bash does not always leave out the process in between.
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = unshare ]; then pid=$(pgrep -P "$pid" | head -n 1); fi
    echo "$pid"
}
in_network() { # DIR NAME COMMAND…
    local pid
    pid=$(init_of "$1" "$2") || die "$2 is not running"
    shift 2
    nsenter -t "$pid" -n -- "$@"
}
slurm() { local dir=$1; shift; SLURM_CONF=$dir/etc/slurm.conf in_network "$dir" login "$@"; }
detached() ( # COMMAND…: without any descriptor of ours, or whoever reads a pipe from us would wait for ever
    for fd in "/proc/$BASHPID/fd"/*; do
        fd=${fd##*/}
        [ "$fd" -le 2 ] || eval "exec $fd>&-"
    done
    exec setsid "$@"
)

hold() { # DIR NAME: make the namespaces
    local dir=$1 nd=$1/nodes/$2
    mkdir -p "$nd/spool"
    rm -f "$nd"/{ready,go,started,holder}
    # Daemons are started with a clean environment: jobs must not depend on what this shell had.
    detached unshare --net --mount --uts --pid --fork --kill-child=SIGKILL --mount-proc \
        env -i HOME="${HOME:-/root}" LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        bash "$PROG" __init "$dir" "$2" </dev/null >"$dir/log/init.$2.log" 2>&1 &
    echo "$! $(born $!)" >"$nd/holder"
    disown
}

wait_file() { # FILE SECONDS DIR NAME
    local end=$((SECONDS + $2))
    while [ ! -e "$1" ]; do
        [ $SECONDS -lt $end ] && holder "$3" "$4" >/dev/null || return 1
        sleep 0.02
    done
}

plug() { # DIR NAME: connect it, then let the daemons start
    local dir=$1 name=$2 nd=$1/nodes/$2 link=eth0
    wait_file "$nd/ready" 10 "$dir" "$name" || { cat "$dir/log/init.$name.log" >&2; die "$name did not come up"; }
    if [ "$name" = login ]; then
        in_network "$dir" login ip link add br0 type bridge
        link=br0
    else
        in_network "$dir" login ip link del "v-$name" 2>/dev/null || true
        in_network "$dir" login ip link add "v-$name" type veth peer name eth0 netns "$(init_of "$dir" "$name")"
        in_network "$dir" login ip link set "v-$name" master br0 up
    fi
    in_network "$dir" "$name" ip addr add "$(ip_of "$name")/24" dev $link
    in_network "$dir" "$name" ip link set $link up
    touch "$nd/go"
}

# A command with the freezer hierarchy of control groups (version 1) as its folder, mounted where nobody else sees it.
freezer() {
    unshare --mount sh -c 'mount -t tmpfs tmpfs /mnt && mkdir /mnt/f && mount -t cgroup -o freezer cgroup /mnt/f &&
        cd /mnt/f && "$@"' sh "$@" 2>/dev/null
}

write_slurm_conf() { # DIR
    local dir=$1 i line gres=""
    sed "s|@DIR@|$dir|; s|@NET@|$NET|; s|@PROCTRACK@|$PROCTRACK|" "$(dirname "$PROG")/slurm.conf" >"$dir/etc/slurm.conf"
    for line in ${OPTS[@]+"${OPTS[@]}"}; do
        sed -i "/^${line%%=*}=/d" "$dir/etc/slurm.conf"
        echo "$line" >>"$dir/etc/slurm.conf"
    done
    : >"$dir/etc/gres.conf"
    if [ "$GPUS" -gt 0 ]; then # slurmd wants devices, so they are /dev/null by other names
        for ((i = 0; i < GPUS; i++)); do [ -c "$dir/dev/nvidia$i" ] || mknod -m 666 "$dir/dev/nvidia$i" c 1 3; done
        line="$dir/dev/nvidia0"
        [ "$GPUS" -eq 1 ] || line="$dir/dev/nvidia[0-$((GPUS - 1))]"
        echo "NodeName=node[1-$NODES] Name=gpu Type=fake File=$line" >"$dir/etc/gres.conf"
        gres=" Gres=gpu:fake:$GPUS"
    fi
    for ((i = 1; i <= NODES; i++)); do # before the partitions, which are made of them
        line="NodeName=node$i NodeAddr=$(ip_of "node$i") CPUs=$CPUS RealMemory=8000$gres"
        sed -i "0,/^PartitionName/s|^PartitionName|$line\n&|" "$dir/etc/slurm.conf"
    done
}

write_ssh_config() { # DIR
    local dir=$1 key
    : >"$dir/etc/ssh_config"
    [ -x /usr/sbin/sshd ] || return 0
    for key in host_key id; do ssh-keygen -q -t ed25519 -N '' -C lab -f "$dir/ssh/$key"; done
    { printf 'login,node*,%s.* ' $NET; cat "$dir/ssh/host_key.pub"; } >"$dir/ssh/known_hosts"
    printf '%s\n' "HostKey $dir/ssh/host_key" "PidFile none" "AuthorizedKeysFile $dir/ssh/id.pub" "StrictModes no" \
        "PasswordAuthentication no" "KbdInteractiveAuthentication no" "PermitRootLogin prohibit-password" "UsePAM no" \
        "MaxStartups 64" >"$dir/etc/sshd_config"
    printf '%s\n' "IdentityFile $dir/ssh/id" "IdentitiesOnly yes" "BatchMode yes" "StrictHostKeyChecking yes" \
        "UserKnownHostsFile $dir/ssh/known_hosts" "GlobalKnownHostsFile /dev/null" "ConnectTimeout 5" "LogLevel ERROR" \
        >"$dir/etc/ssh_config"
}

write_config() { # DIR
    local dir=$1 h command
    rm -rf "${dir:?}"/{state,nodes,munge,log,etc,bin,ssh}
    mkdir -p "$dir"/{etc,log,state,nodes,munge,dev,bin}
    mkdir -m 700 "$dir/ssh"
    chmod 755 "$dir"
    [ -s "$dir/munge.key" ] || head -c 1024 /dev/urandom >"$dir/munge.key"
    chmod 400 "$dir/munge.key"
    {
        echo "127.0.0.1 localhost"
        for h in $(hosts_of); do printf '%s %s\n::ffff:%s %s\n' "$(ip_of "$h")" "$h" "$(ip_of "$h")" "$h"; done
    } >"$dir/etc/hosts"
    : >"$dir/etc/resolv.conf"
    printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no CgroupMountpoint=/run/cg >"$dir/etc/cgroup.conf"
    write_slurm_conf "$dir"
    write_ssh_config "$dir"
    # The clients for use from the machine itself, where they enter login's network. Jobs inherit this PATH, and inside
    # a host the same names are the plain commands.
    for command in sbatch srun salloc squeue sinfo scontrol scancel sbcast; do
        cat >"$dir/bin/$command" <<EOF
#!/bin/sh
[ -e /run/slurmlab.host ] && exec /usr/bin/$command "\$@"
read -r holder time <'$dir/nodes/login/holder'
export SLURM_CONF='$dir/etc/slurm.conf'
exec nsenter -t "\$(pgrep -P "\$holder" | head -n 1)" -n -u -- /usr/bin/$command "\$@"
EOF
        chmod 755 "$dir/bin/$command"
    done
}

print_env() {
    printf "export SLURMLAB_DIR='%s'\nexport SLURM_CONF='%s/etc/slurm.conf'\n" "$1" "$1"
    printf "export PATH='%s/bin':\"\$PATH\"\n" "$1"
}

wait_idle() { # DIR SECONDS
    local end=$((SECONDS + $2)) ready
    while [ $SECONDS -lt $end ]; do
        ready=$(slurm "$1" sinfo -h -N -p main -o %T 2>/dev/null | grep -cxE 'idle|mixed|allocated' || true)
        [ "$ready" -ne "$NODES" ] || return 0
        sleep 0.1
    done
    return 1
}

stop_host() { # DIR NAME: the end of its first process ends all others
    local pid init
    pid=$(holder "$1" "$2") || return 0
    init=$(init_of "$1" "$2") || true
    kill -KILL ${init:+"$init"} "$pid" 2>/dev/null || true
    for ((n = 0; n < 500; n++)); do
        if ! holder "$1" "$2" >/dev/null && ! { [ -n "$init" ] && born "$init" >/dev/null; }; then
            rm -f "$1/nodes/$2/holder"
            return 0
        fi
        sleep 0.02
    done
    die "$2 (process $pid) does not die"
}

stop_all() { # DIR
    local file
    load "$1"
    for file in "$1"/nodes/*/holder; do
        [ ! -e "$file" ] || stop_host "$1" "$(basename "$(dirname "$file")")"
    done
    [ "$PROCTRACK" != cgroup ] || freezer find "$TAG" -depth -type d -exec rmdir {} \; || true
}

cmd_up() {
    local dir="" name
    NODES=2 CPUS=4 GPUS=0 PROCTRACK="" WATCH="" OPTS=()
    while [ $# -gt 0 ]; do
        case $1 in
            -n) NODES=$2; shift 2 ;;
            -c) CPUS=$2; shift 2 ;;
            -g) GPUS=$2; shift 2 ;;
            -p) PROCTRACK=$2; shift 2 ;;
            --watch) WATCH=$2; shift 2; born "$WATCH" >/dev/null || die "up: no process $WATCH" ;;
            --opt) OPTS+=("$2"); shift 2 ;;
            -*) die "up: there is no option $1" ;;
            *) dir=$1; shift ;;
        esac
    done
    [ "$(id -u)" = 0 ] || die "up: needs root"
    for name in slurmctld slurmd munged unshare nsenter ip pgrep; do
        command -v $name >/dev/null || die "$name is missing: apt-get install slurm-wlm munge iproute2 util-linux procps"
    done
    [ -n "$dir" ] || dir=${SLURMLAB_DIR:-$(mktemp -d /tmp/slurmlab.XXXXXX)}
    mkdir -p "$dir"
    dir=$(readlink -f "$dir")
    case $dir/ in /run/* | /dev/* | /srv/* | /etc/* | /proc/*) die "up: DIR may not be below /run, /dev, /srv, /etc, /proc" ;; esac
    [ ${#dir} -lt 60 ] || die "up: DIR is too long for the names of sockets"
    if [ -r "$dir/cluster.vars" ]; then
        ! holder "$dir" login >/dev/null || die "up: a cluster runs in $dir already; end it with: cluster.sh down $dir"
        (stop_all "$dir")
    elif [ -n "$(ls -A "$dir")" ]; then
        die "up: $dir is not empty and holds no cluster"
    fi
    if [ -z "$PROCTRACK" ]; then
        PROCTRACK=cgroup
        freezer true || { PROCTRACK=linuxproc; say "no freezer of version 1 here: proctrack/linuxproc"; }
    fi
    TAG=slurmlab.$(printf %s "$dir" | cksum | cut -d' ' -f1)
    printf 'NODES=%s CPUS=%s GPUS=%s PROCTRACK=%s TAG=%s\n' "$NODES" "$CPUS" "$GPUS" "$PROCTRACK" "$TAG" >"$dir/cluster.vars"
    write_config "$dir"
    for name in $(hosts_of); do hold "$dir" "$name"; done
    for name in $(hosts_of); do plug "$dir" "$name"; done
    for name in $(hosts_of); do
        wait_file "$dir/nodes/$name/started" 45 "$dir" "$name" ||
            { cat "$dir/log/init.$name.log" >&2; stop_all "$dir"; die "$name: daemons did not start, see $dir/log"; }
    done
    if ! wait_idle "$dir" 30; then
        tail -n 20 "$dir"/log/slurmctld.log "$dir"/log/slurmd.*.log >&2 || true
        stop_all "$dir"
        die "the nodes did not become ready, see $dir/log"
    fi
    if [ -n "$WATCH" ]; then
        detached bash "$PROG" __watch "$dir" "$WATCH" "$(born "$WATCH")" </dev/null >/dev/null 2>&1 &
        disown
    fi
    print_env "$dir"
}

cmd_down() { # DIR
    [ -r "$1/cluster.vars" ] || { say "no cluster in $1: nothing to do"; return 0; }
    stop_all "$1"
    rm -rf "${1:?}"/{state,nodes,munge,log,etc,bin,dev,ssh,munge.key,cluster.vars}
    rmdir "$1" 2>/dev/null || true # somebody's own files stay
}

cmd_exec() {
    local host=login user="" pid
    while [ $# -gt 0 ]; do
        case $1 in
            -H) host=$2; shift 2 ;;
            -u) user=$2; shift 2 ;;
            --) shift; break ;;
            *) break ;;
        esac
    done
    pid=$(init_of "$DIR" "$host") || die "$host is not running"
    [ -z "$user" ] || set -- setpriv --reuid="$user" --regid="$(id -g "$user")" --init-groups -- "$@"
    SLURM_CONF=$DIR/etc/slurm.conf exec nsenter -t "$pid" -m -u -n -p --wdns="$PWD" -- "$@"
}

cmd_start() { # HOST
    if holder "$DIR" "$1" >/dev/null; then
        cmd_exec -H "$1" bash "$PROG" __daemons "$DIR" "$1" </dev/null >/dev/null 2>&1
    fi
    hold "$DIR" "$1"
    plug "$DIR" "$1"
    wait_file "$DIR/nodes/$1/started" 15 "$DIR" "$1" || die "$1: daemons did not start, see $DIR/log"
}

cmd_wait() { # JOB [SECONDS]; sbatch --wait itself asks after 2, 10, 42… seconds only
    local end=$((SECONDS + ${2:-120})) record state code restarts
    while :; do
        record=$(slurm "$DIR" scontrol -o show job "$1") || exit 2
        state=$(sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' <<<"$record")
        if [[ $state =~ $ENDED ]]; then
            code=$(sed -n 's/.* ExitCode=\([0-9:]*\).*/\1/p' <<<"$record")
            restarts=$(sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' <<<"$record")
            echo "$state $code $restarts"
            [ "$state" = COMPLETED ]
            exit
        fi
        [ $SECONDS -lt $end ] || { echo "$state"; exit 124; }
        sleep 0.2
    done
}

DIR=${SLURMLAB_DIR:-} verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
    env | exec | fail | start | kill-slurmd | net | wait) [ -n "$DIR" ] || die "$verb: SLURMLAB_DIR is not set"; load "$DIR" ;;
esac
case $verb in fail | start | kill-slurmd | net) [ -d "$DIR/nodes/${1:-}/spool" ] || die "$verb: there is no host '${1:-}'" ;; esac
case $verb in
    __init) host_init "$@" ;;
    __daemons) host_daemons "$@" ;;
    __watch)
        while [ "$(born "$2")" = "$3" ] && holder "$1" login >/dev/null; do sleep 1; done
        ! holder "$1" login >/dev/null || cmd_down "$1" ;;
    up) cmd_up "$@" ;;
    down) DIR=${1:-$DIR}; [ -n "$DIR" ] || die "down: which DIR?"; cmd_down "$DIR" ;;
    env) print_env "$DIR" ;;
    exec) cmd_exec "$@" ;;
    fail) stop_host "$DIR" "$1" ;;
    kill-slurmd) cmd_exec -H "$1" pkill -KILL -x slurmd ;;
    start) cmd_start "$1" ;;
    net) case ${2:-} in up | down) in_network "$DIR" login ip link set "v-$1" "$2" ;; *) die "net NODE up|down" ;; esac ;;
    wait) cmd_wait "$@" ;;
    *) sed -n '2,/^set -/s/^# \{0,1\}//p' "$PROG"; exit 2 ;;
esac
