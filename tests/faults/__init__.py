"""Faults: processes are killed and storage fails, and what was promised must still hold.

python -m tests.faults                      lists the entries
python -m tests.faults NAME... [--trials N --seed S]
"""
