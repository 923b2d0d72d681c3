"""Gather the evaluations of run folders, one CSV and one JSON a cell: what figures.py and table.py read.

    python utils/collect.py benchmark_runs/runs/* --output results/data

`{task}__{script}__{seed}.csv` has a row for every evaluation episode, `.json` the flags, versions and commits that made it. A
cell that is there already is replaced if the run went on since, and refused if another run's evaluations would be lost.
"""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from evaluations import read_run


@dataclass
class Args:
    run_dirs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_DIR ...")]
    """run folders, each with its evaluations.csv and config.json"""
    output: str = "results/data"
    """the folder to write to"""


def main(args):
    if not args.run_dirs:
        sys.exit("no run folders were named; name some, as in benchmark_runs/runs/*")
    cells = {}
    for run_dir in args.run_dirs:
        paths = [os.path.join(run_dir, name) for name in ("evaluations.csv", "config.json")]
        config = read_run(*paths).config
        name = re.sub(r"[^\w.-]", "-", f"{config['env_id']}__{config['exp_name']}__{config['seed']}")
        if name in cells:
            sys.exit(f"{cells[name][0]} and {paths[0]} are of one cell, {name}: name one of them")
        cells[name] = paths
    for name, (evaluations, _) in cells.items():
        there = os.path.join(args.output, name + ".csv")
        if os.path.exists(there):
            with open(there) as before, open(evaluations) as now:
                if not now.read().startswith(before.read()):
                    sys.exit(f"{there}: holds other evaluations than {evaluations} begins with; move it away first")
    try:
        os.makedirs(args.output, exist_ok=True)
        for name, paths in cells.items():
            for path, suffix in zip(paths, (".csv", ".json"), strict=True):
                there = os.path.join(args.output, name + suffix)
                shutil.copyfile(path, there + ".new")
                os.replace(there + ".new", there)
    except OSError as error:
        sys.exit(f"{args.output}: cannot be written ({error}); what was there before is whole")
    print(f"{args.output}: {len(cells)} cells", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
