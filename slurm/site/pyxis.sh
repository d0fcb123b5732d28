# shellcheck shell=bash disable=SC2034  # what is set here is used by the script that reads this
# A site with enroot and pyxis, NVIDIA's container plugin of srun. In ~/.config/dsgpt/site.sh:
#
#   DSGPT_IMAGE=/shared/images/dsgpt.sqsh
#   . /shared/dsgpt/slurm/site/pyxis.sh
#
# DSGPT_IMAGE   a squashfs file made by `enroot import` (best), or registry#name:tag; dsgpt is installed in it
# DSGPT_MOUNTS  folders the job needs besides the home and the one sbatch was called in: /data:/data,/scratch:/scratch
#
# The batch script itself runs outside of the container, where SLURM's commands are; python is called inside alone.
: "${DSGPT_IMAGE:?set it in site.sh to the image}"
: "${DSGPT_MOUNTS=}"

case $DSGPT_IMAGE in
    /*)
        if [ ! -r "$DSGPT_IMAGE" ]; then
            echo "site: $(hostname) cannot read the image $DSGPT_IMAGE" >&2
            return 1
        fi
        ;;
esac
DSGPT_SRUN=(--container-image="$DSGPT_IMAGE" --container-mounts="$PWD:$PWD${DSGPT_MOUNTS:+,$DSGPT_MOUNTS}"
    --container-mount-home --container-workdir="$PWD")
DSGPT_PYTHON=(python)
