"""The tests, benchmarks and fault injections of dsgpt. README.md beside this file says how to run which."""
