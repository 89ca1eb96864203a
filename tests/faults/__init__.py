"""Fault campaigns: each fault that can happen to a run is injected many times.

`make faults` runs all rows in full, `make faults ROW=kill` one of them; a stopped campaign resumes.
The tests run a few trials of each row.
"""
