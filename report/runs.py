"""Read runs for `compare` and `plot`, from their folders or from packed files, and pack them.

A packed file, NAME.jsonl.xz, holds one line of JSON per run: its name, config.json, metrics.jsonl
(a list per key), evals.jsonl and every summary.json. It reads like a folder of runs, and a glob
behind it chooses among them: results/tiny.jsonl.xz/edge-*
"""

import json
import lzma
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from engine.flags import MAY_CHANGE
from engine.folder import read_json, read_lines
from errors import UserError
from report.paper import METHODS
from report.tables import group

SWITCHES = ("correction", "sft", "eda")  # flags that make a method: labels always name them
NOT_LABELLED = MAY_CHANGE | {"profile", "seed", "method"}


@dataclass
class Run:
    path: Path
    method: str  # its name in tables; for results of eval.py alone, the model
    seed: int
    steps: int = 0  # of training
    flags: dict[str, str] = field(default_factory=dict)  # those that affect the results, as text
    changed: set[str] = field(default_factory=set)  # flags that differ from the method's defaults
    metrics: list[dict] = field(default_factory=list)  # lines of metrics.jsonl
    evals: list[dict] = field(default_factory=list)  # lines of evals.jsonl
    results: dict[tuple, dict] = field(default_factory=dict)  # at its end, by (task, way)
    analyses: list[tuple[float, dict]] = field(default_factory=list)  # (T, results of eval.py)
    label: str = ""  # runs with one label differ only in their seed
    shared: str = ""  # flag=value that all runs of the method have; labels leave them out


def read_runs(paths: list) -> list[Run]:
    """Read and label the runs, in the order of METHODS. Raises UserError if there are none."""
    runs = []
    for path, content in contents(paths).items():
        try:
            runs.append(make_run(path, content))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{path}: its files were not written by edge_grpo.py or eval.py "
                f"({type(error).__name__}: {error}); leave that folder out"
            ) from None
    for of_method in group(runs, lambda run: run.method).values():
        label_runs(of_method)
    order = list(METHODS.values())
    return sorted(runs, key=lambda run: order.index(run.method) if run.method in order else -1)


def label_runs(runs: list[Run]) -> None:
    """Label the runs of one method: its name, and flag=value for each flag that was changed.

    Changes that all of them share go to `shared` instead, except SWITCHES. A flag that an older
    run does not know counts as unchanged. Where the default itself has changed between runs, each
    value is named.
    """
    defaults = defaultdict(set)
    for run in runs:
        for flag in run.flags.keys() - run.changed:
            defaults[flag].add(run.flags[flag])
    for run in runs:
        run.label = run.method
        for flag, value in run.flags.items():
            if defaults[flag] == {value}:
                continue
            differs = any(other.flags.get(flag) != value for other in runs)
            if differs or flag in SWITCHES:
                run.label += f" {flag}={value}"
            else:
                run.shared += f" {flag}={value}"


def contents(paths: list) -> dict[Path, dict]:
    """Read the files of each run, by its path. Paths without a run are skipped with a note."""
    runs, skipped = {}, []
    for given in map(Path, paths):
        found = dict(find_runs(given))
        runs |= found
        if not found:
            skipped.append(given)
    if not runs:
        raise UserError(
            f"{paths[0]}: no run (config.json), no results of eval.py (summary.json) and no "
            "packed runs (.jsonl.xz) of that name"
        )
    if skipped:
        print(f"skipped, as they hold no run: {', '.join(map(str, skipped))}", file=sys.stderr)
    return runs


def find_runs(given: Path) -> Iterator[tuple[Path, dict]]:
    """Yield (path, content) of the run in a folder, of every run below it, or of the runs in a
    packed file whose names match a glob."""
    name, packed, wanted = str(given).partition(".xz")
    if packed and Path(name + packed).is_file():
        file = Path(name + packed)
        for row in read_packed(file):
            if fnmatch(row["name"], wanted.strip("/") or "*"):
                yield file / row["name"], row
        return
    config = given / "config.json"
    if config.exists() or (given / "summary.json").exists():
        summaries = sorted({*given.glob("summary.json"), *given.glob("eval/**/summary.json")})
        yield (
            given,
            dict(
                config=read_json(config) if config.exists() else None,
                metrics=read_lines(given / "metrics.jsonl")[0],
                evals=read_lines(given / "evals.jsonl")[0],
                summaries=list(map(read_json, summaries)),
            ),
        )
    elif given.is_dir():
        for child in sorted(given.iterdir()):
            yield from find_runs(child)


def read_packed(file: Path) -> list[dict]:
    """Read the lines of a packed file; their metrics become a list of steps again."""
    try:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            rows = list(map(json.loads, lines))
    except (lzma.LZMAError, EOFError, ValueError):
        raise UserError(
            f"{file}: damaged, or not a file of packed runs (eval.py pack); get it anew"
        ) from None
    for row in rows:
        steps = zip(*row["metrics"].values())
        row["metrics"] = [dict(zip(row["metrics"], values)) for values in steps]
    return rows


def pack(file: Path, paths: list) -> None:
    """Write all that `compare` and `plot` read to one file, metrics to three digits.

    Raises UserError for two runs of one name, or for a file name that is not NAME.jsonl.xz.
    """
    if not file.name.endswith(".jsonl.xz"):
        raise UserError(f"--out {file}: the name of a file of packed runs ends in .jsonl.xz")
    rows = {}
    for path, content in contents(paths).items():
        if path.name in rows:
            raise UserError(
                f"{path}: another run is also named {path.name}; pack them into two files"
            )
        columns = {}
        for key in dict.fromkeys(key for line in content["metrics"] for key in line):
            columns[key] = [rounded(line.get(key)) for line in content["metrics"]]
        rows[path.name] = {**content, "name": path.name, "metrics": columns}
    file.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(file, "wt", encoding="utf-8") as packed:
        for row in rows.values():
            packed.write(json.dumps(row, separators=(",", ":")) + "\n")


def rounded(value: object) -> object:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def make_run(path: Path, content: dict) -> Run:
    """Make a run from the content of its files.

    Its results are those of eval.py, or else of its last evaluation in training, and never of its
    best one.
    """
    config, summaries = content["config"], content["summaries"]
    if config is None:
        run = Run(path, summaries[0]["model"], summaries[0]["seed"])
    else:
        method = METHODS.get(config["method"], config["method"])
        run = Run(path, method, config["seed"], config["flags"]["steps"])
        run.changed = set(config["changed"])
        for flag, value in config["flags"].items():
            if flag not in NOT_LABELLED and not flag.startswith("eval_"):
                # no blanks; and warm starts of several seeds are one experiment
                run.flags[flag] = re.sub(r" |-seed\d+(?=/|$)", "", str(value))
        limit = config["flags"].get("eval_max_new_tokens")
        run.evals = [{"max_new_tokens": limit, **line} for line in content["evals"]]
    run.metrics = content["metrics"]
    for summary in summaries:
        for temperature, result in summary["results"].items():
            run.analyses.append((float(temperature), result))
            how = dict(summary.get("settings", {}), temperature=float(temperature))
            for task, numbers in result["tasks"].items():
                add_result(run, task, {**how, **numbers})
    evaluated = {task for task, _ in run.results}
    for line in run.evals:
        if line["step"] == run.evals[-1]["step"] and line["task"] not in evaluated:
            add_result(run, line["task"], line)
    return run


def add_result(run: Run, task: str, numbers: dict) -> None:
    """Add what was measured on a task to the run's results, by the way in which it was sampled.

    Raises UserError if the task was measured twice in that way.
    """
    way = f"avg@{numbers['n']} T={numbers['temperature']:g}"
    if (task, way) in run.results:
        raise UserError(
            f"{run.path}: its eval/ holds {task}, {way}, twice, say of two seeds; move one of the "
            "folders away"
        )
    run.results[task, way] = numbers
