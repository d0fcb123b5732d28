"""dsgpt trains GPT models on DeepSpeed, from a laptop to a SLURM cluster, with one config and one code path.

Importing the package imports nothing else: `dsgpt --help` must start in a fraction of a second on a login node.
"""

__version__ = "0.1.0"
