"""Collect the evaluations of run folders, for figures.py and table.py.

    python utils/collect.py benchmark_runs/runs/* --output results/data

Each run becomes two files: `{task}__{script}__{seed}.csv` has a row for every evaluation episode; the `.json` has the flags,
versions and commits. A longer version of the same run replaces its files; any other run is refused.
"""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from evaluations import differing, read_run


@dataclass
class Args:
    run_dirs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_DIR ...")]
    """run folders"""
    output: str = "results/data"
    """the folder to write to"""


def main(args):
    if not args.run_dirs:
        sys.exit("name at least one run folder, e.g. benchmark_runs/runs/*")
    runs, configs = {}, {}
    for run_dir in args.run_dirs:
        paths = [os.path.join(run_dir, name) for name in ("evaluations.csv", "config.json")]
        config = read_run(*paths).config
        name = re.sub(r"[^\w.-]", "-", f"{config['env_id']}__{config['exp_name']}__{config['seed']}")
        if name in runs:
            sys.exit(f"{runs[name][0]} and {paths[0]} are both {name}; name only one of them")
        runs[name], configs[name] = paths, config
    for name, (evaluations, _) in runs.items():
        target = os.path.join(args.output, name + ".csv")
        if os.path.exists(target):
            with open(target) as old, open(evaluations) as new:
                if not new.read().startswith(old.read()):
                    sys.exit(f"{target}: holds evaluations that {evaluations} does not have; move it away first")
            if keys := differing([configs[name], read_run(target, target[: -len("csv")] + "json").config]):
                sys.exit(f"{target}: holds a run with other flags than {evaluations} ({', '.join(keys)}); move it away first")
    try:
        os.makedirs(args.output, exist_ok=True)
        for name, paths in runs.items():
            for path, suffix in zip(paths, (".csv", ".json"), strict=True):
                target = os.path.join(args.output, name + suffix)
                shutil.copyfile(path, target + ".new")
                os.replace(target + ".new", target)
    except OSError as error:
        sys.exit(f"{args.output}: cannot write ({error}); the old files are intact")
    print(f"{args.output}: collected {len(runs)} runs", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
