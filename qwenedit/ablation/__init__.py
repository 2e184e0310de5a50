"""A grid of changes to the system, and what they did.

spec.py reads what is wanted, sweep.py runs it, metrics.py and attention.py measure, report.py and charts.py
show it. What can be changed is in `qwenedit.switches`.
"""
