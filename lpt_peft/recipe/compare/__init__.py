"""Comparison of several rows of settings over several seeds.

    cells.py      a cell, one row with one seed: its folder and what was measured
    schedule.py   cells side by side in processes
    results.py    mean, spread, intervals and paired differences; the table and JSON
    figure.py     the figure

Not here: what a cell trains, which the caller provides (`lpt_peft.cli.compare`).
"""
