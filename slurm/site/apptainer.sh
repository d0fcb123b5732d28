# shellcheck shell=bash disable=SC2034  # what is set here is used by the script that reads this
# A site with Apptainer (or Singularity). In ~/.config/dsgpt/site.sh:
#
#   DSGPT_IMAGE=/shared/images/dsgpt.sif
#   . /shared/dsgpt/slurm/site/apptainer.sh
#
# DSGPT_IMAGE      the image, with dsgpt installed in it, on a file system that all nodes see
# DSGPT_BIND       folders the job needs besides the home, /tmp and the one sbatch was called in, separated by commas
# DSGPT_APPTAINER  the command, where it is singularity or not on PATH
# DSGPT_GPU        what gives the container its GPUs: --rocm for AMD, empty for none
#
# No --pid and no --containall: signals have to reach python, and ranks to see the files of the run.
: "${DSGPT_IMAGE:?set it in site.sh to the image}"
: "${DSGPT_BIND=}" "${DSGPT_APPTAINER=apptainer}" "${DSGPT_GPU=--nv}"

if ! command -v "$DSGPT_APPTAINER" >/dev/null; then
    echo "site: no $DSGPT_APPTAINER on $(hostname): load its module in site.sh, or set DSGPT_APPTAINER" >&2
    return 1
fi
if [ ! -r "$DSGPT_IMAGE" ]; then
    echo "site: $(hostname) cannot read the image $DSGPT_IMAGE" >&2
    return 1
fi
DSGPT_PYTHON=("$DSGPT_APPTAINER" exec ${DSGPT_GPU:+"$DSGPT_GPU"} --bind "$PWD${DSGPT_BIND:+,$DSGPT_BIND}" --pwd "$PWD"
    "$DSGPT_IMAGE" python)
