"""Proof on a GPU: `python -m bench.gpu --out DIR` checks and times every backend there, in minutes, into one report.

`check.py` says what a check is, `limits.py` what results are held to, `problems.py` on what; `chain.py`, `pieces.py`,
`indices.py`, `citizen.py` and `large.py` hold the checks that `worker.py` runs in processes of their own. `facts.py`,
`benchmarks.py`, `hopper.py` and `sanitizer.py` are steps of other kinds. `steps.py` lists all steps, `runner.py` runs
them inside a time budget, `report.py` writes and files the report.
"""
