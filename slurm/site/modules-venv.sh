# shellcheck shell=bash disable=SC2034  # what is set here is used by the script that reads this
# A site with modules and a virtual environment. In ~/.config/dsgpt/site.sh:
#
#   DSGPT_MODULES="gcc/12 cuda/12.6" DSGPT_VENV=/shared/venvs/dsgpt
#   . /shared/dsgpt/slurm/site/modules-venv.sh
#
# DSGPT_MODULES    modules to load, in this order; empty for none
# DSGPT_VENV       the environment, on a file system that all nodes see
# DSGPT_STAGE      an archive of that environment, made by `tar -czf dsgpt.tgz -C "$DSGPT_VENV" .`: it is sent to a disk
#                  of every node and unpacked there, so that a thousand ranks do not import from the shared file
#                  system at once. Worth it from some dozen nodes on; empty for not
# DSGPT_STAGE_DIR  where on the nodes: a local disk, the same path on all of them
#
# The interpreter finds an unpacked environment's packages by its own place, so an archive may be unpacked anywhere; what
# is installed with `pip install -e` stays where it is. Where staging fails, the job says so and uses DSGPT_VENV.
: "${DSGPT_VENV:?set it in site.sh to the folder of the virtual environment}"
: "${DSGPT_MODULES=}" "${DSGPT_STAGE=}" "${DSGPT_STAGED=}" "${DSGPT_STAGE_DIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}"

# A batch shell is not a login shell: `module` may not be there yet.
if [ -n "$DSGPT_MODULES" ] && ! command -v module >/dev/null; then
    for dsgpt_file in /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh /etc/profile.d/modules.sh; do
        # shellcheck source=/dev/null
        if [ -r "$dsgpt_file" ]; then . "$dsgpt_file"; break; fi
    done
fi
for dsgpt_module in $DSGPT_MODULES; do
    module load "$dsgpt_module" || { echo "site: module load $dsgpt_module failed on $(hostname)" >&2; return 1; }
done

if [ ! -x "$DSGPT_VENV/bin/python" ]; then
    echo "site: no $DSGPT_VENV/bin/python on $(hostname): is DSGPT_VENV a virtual environment that this node sees?" >&2
    return 1
fi
export PATH="$DSGPT_VENV/bin:$PATH"
DSGPT_PYTHON=("$DSGPT_VENV/bin/python")

dsgpt_on_nodes() {
    srun --export=ALL --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --cpus-per-task=1 "$@"
}
# A job that is cancelled or requeued can start nothing more: what it leaves is removed by the next one on that node.
dsgpt_unstage() { dsgpt_on_nodes rm -rf -- "$dsgpt_staged" "$dsgpt_staged.tar" 2>/dev/null; }
# shellcheck disable=SC2016  # expanded on the nodes. $1: the new folder, $2: jobs whose folders stay, empty if not known
dsgpt_unpack='for old in "${1%/*}"/dsgpt-env-*; do
    job=${old##*/dsgpt-env-} job=${job%%-*}
    case $old in "$1"*) continue ;; esac
    case $2 in "" | *" $job "*) continue ;; esac
    [ ! -O "$old" ] || rm -rf -- "$old"
done
mkdir -m 700 -- "$1" && tar -xf "$1.tar" -C "$1" && rm -- "$1.tar" && test -x "$1/bin/python"'
# A rehearsal runs train.sbatch within its own job: that one uses what is unpacked already.
if [ -n "$DSGPT_STAGE" ] && [ "${DSGPT_STAGED%%:*}" = "${SLURM_JOB_ID:-none}" ]; then
    DSGPT_PYTHON=("${DSGPT_STAGED#*:}/bin/python")
    export PATH="${DSGPT_STAGED#*:}/bin:$PATH"
elif [ -n "$DSGPT_STAGE" ] && [ -n "${SLURM_JOB_NUM_NODES:-}" ]; then
    # A name that nobody can have taken before, and a folder that nobody else can write to: code is run from it.
    dsgpt_staged=$DSGPT_STAGE_DIR/dsgpt-env-$SLURM_JOB_ID-$(date +%s)-$RANDOM$RANDOM
    trap dsgpt_unstage EXIT
    dsgpt_began=$SECONDS
    if dsgpt_jobs=$(squeue --noheader --user="$(id -un)" --states=RUNNING,COMPLETING,SUSPENDED --format=%A); then
        dsgpt_jobs=" ${dsgpt_jobs//$'\n'/ } "
        dsgpt_jobs=${dsgpt_jobs/ $SLURM_JOB_ID / }
    else
        dsgpt_jobs=""
    fi
    if sbcast --force "$DSGPT_STAGE" "$dsgpt_staged.tar" &&
        dsgpt_on_nodes sh -c "$dsgpt_unpack" sh "$dsgpt_staged" "$dsgpt_jobs"; then
        echo "site: $DSGPT_STAGE is unpacked on every node ($SLURM_JOB_NUM_NODES), in $((SECONDS - dsgpt_began)) s" >&2
        DSGPT_PYTHON=("$dsgpt_staged/bin/python")
        export PATH="$dsgpt_staged/bin:$PATH" DSGPT_STAGED="$SLURM_JOB_ID:$dsgpt_staged"
    else
        echo "site: warning: $DSGPT_STAGE could not be staged to $DSGPT_STAGE_DIR; python comes from $DSGPT_VENV" >&2
    fi
fi
