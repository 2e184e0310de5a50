"""Sweeps: edits under a grid of settings, with metrics and a report.

spec.py reads the settings, sweep.py runs them, metrics.py and attention.py measure, report.py and charts.py
show the results. The settings are those of `qwenedit.switches`.
"""
