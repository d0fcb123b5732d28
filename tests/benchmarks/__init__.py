"""Figures with a must: speed, memory and size, measured on this machine.

python -m tests.benchmarks                      lists the entries
python -m tests.benchmarks NAME... [--trials N --seed S]
"""
