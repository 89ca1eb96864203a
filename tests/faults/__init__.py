"""Fault campaigns: what can happen to a run, done to it many times.

`make faults` runs all rows in full, `make faults ROW=kill` one of them; stopped, it goes on where
it was. The tests run a few trials of each row.
"""
