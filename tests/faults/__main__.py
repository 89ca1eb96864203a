"""`python -m tests.faults [--row NAME] [--count N]`: run campaigns and print their table."""

import argparse
from pathlib import Path

from tests.faults.campaign import run_campaign, table
from tests.faults.rows import ROWS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=[row.name for row in ROWS])
    parser.add_argument("--count", type=int, help="most trials of each row")
    parser.add_argument("--results", type=Path, default=Path("build/faults"))
    options = parser.parse_args()
    rows = [row for row in ROWS if options.row in (None, row.name)]
    results = {row.name: run_campaign(row, options.results, options.count) for row in rows}
    print(table(rows, results))
    return int(any(entry["ok"] is False for done in results.values() for entry in done))


if __name__ == "__main__":
    raise SystemExit(main())
