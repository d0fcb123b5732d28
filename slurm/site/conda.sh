# shellcheck shell=bash disable=SC2034  # what is set here is used by the script that reads this
# A site with conda (or mamba, which answers to the same name). In ~/.config/dsgpt/site.sh:
#
#   DSGPT_CONDA=/shared/miniforge3/bin/conda DSGPT_CONDA_ENV=dsgpt
#   . /shared/dsgpt/slurm/site/conda.sh
#
# DSGPT_CONDA      the conda command; the one on PATH where it is not set
# DSGPT_CONDA_ENV  name or folder of the environment, on a file system that all nodes see
#
# The environment is activated once, and its own python is called: `conda run` keeps signals and output to itself, and a
# run that is not told of its time limit cannot save.
: "${DSGPT_CONDA_ENV:?set it in site.sh to the name or folder of the conda environment}"
: "${DSGPT_CONDA=conda}"

dsgpt_hook=$("$DSGPT_CONDA" shell.bash hook) || { echo "site: $DSGPT_CONDA does not work on $(hostname)" >&2; return 1; }
eval "$dsgpt_hook"
conda activate "$DSGPT_CONDA_ENV" || { echo "site: conda activate $DSGPT_CONDA_ENV failed on $(hostname)" >&2; return 1; }
if [ ! -x "${CONDA_PREFIX:-}/bin/python" ]; then
    echo "site: no python in the conda environment $DSGPT_CONDA_ENV (${CONDA_PREFIX:-no CONDA_PREFIX}) on $(hostname)" >&2
    return 1
fi
DSGPT_PYTHON=("$CONDA_PREFIX/bin/python")
