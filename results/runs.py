"""Runs, as `compare` and `plot` read them: a folder of edge_grpo.py, a folder of eval.py's results, or a packed file.

A packed file, NAME.jsonl.xz, has a line for each run: its name, config.json, metrics.jsonl (a list per key),
evals.jsonl and all summary.json. It is read as if it were a folder of these runs, so that a glob behind it chooses some
of them: results/tiny.jsonl.xz/edge-*
"""
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from data import UserError
from results.files import read_json, read_lines
from results.paper import COLOURS
from results.tables import group


@dataclass
class Run:
    path: Path
    method: str                     # of a folder of results alone: its model
    model: str
    seed: int
    steps: int
    flags: dict
    changed: dict                   # the flags that make it another experiment than the defaults of its method do
    metrics: list[dict]             # a step's numbers, without those that are not defined
    evals: list[dict]
    summaries: list[dict]
    scores: dict[str, dict] = field(default_factory=dict)       # by task
    label: str = ""                 # runs with the same label differ in their seed only


def read_runs(paths: list[str]) -> list[Run]:
    """The runs, labelled, in the order of the paper's table. UserError for what is no run and no results."""
    runs = [make_run(path, content) for path, content in contents(paths).items()]
    several_models = len({r.model for r in runs if r.flags}) > 1
    for alike in group(runs, lambda r: r.method).values():
        varying = {k for r in alike for k in r.changed if any(other.flags.get(k) != r.flags[k] for other in alike)}
        for r in alike:
            shown = [f"{k}={v}" for k, v in r.flags.items() if not k.startswith("eval_") and (
                (k in r.changed if k in ("correction", "eda") else k in varying) or (k == "model" and several_models))]
            r.label = " ".join([r.method, *shown])
    order = list(COLOURS)
    return sorted(runs, key=lambda r: order.index(r.method) if r.method in order else -1)


def contents(paths: list[str]) -> dict[Path, dict]:
    """What is in the files of each run, by the run's path."""
    return {path: content for given in paths for path, content in found(Path(given))}


def found(given: Path) -> Iterator[tuple[Path, dict]]:
    file = next((p for p in (given, *given.parents) if p.is_file()), None)
    if file is None:
        yield given, read_folder(given)
        return
    wanted = "*" if given == file else str(given.relative_to(file))
    rows = [row for row in read_packed(file) if fnmatch(row["name"], wanted)]
    if not rows:
        raise UserError(f"{given}: {file} has no run of that name")
    yield from ((file / row["name"], row) for row in rows)


def read_folder(path: Path) -> dict:
    files, config = sorted({*path.glob("summary.json"), *path.glob("eval/**/summary.json")}), path / "config.json"
    if not files and not config.exists():
        raise UserError(f"{path}: neither a run (config.json) nor results of eval.py (summary.json)")
    return dict(config=read_json(config) if config.exists() else None, metrics=read_lines(path / "metrics.jsonl")[0],
                evals=read_lines(path / "evals.jsonl")[0], summaries=[read_json(file) for file in files])


def read_packed(file: Path) -> list[dict]:
    try:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    except (lzma.LZMAError, EOFError, ValueError):
        raise UserError(f"{file}: not a whole file of packed runs (eval.py pack); get it anew") from None
    return [{**row, "metrics": [dict(zip(row["metrics"], values)) for values in zip(*row["metrics"].values())]}
            for row in rows]


def pack(file: Path, paths: list[str]) -> None:
    """Write the runs to a packed file: everything that `compare` and `plot` read, numbers of steps to 6 digits."""
    rows = {}
    for path, content in contents(paths).items():
        make_run(path, content)                                         # only what can be read again is packed
        if path.name in rows:
            raise UserError(f"{path}: another run has the name {path.name} too; pack them into two files")
        keys = dict.fromkeys(key for line in content["metrics"] for key in line)
        metrics = {key: [rounded(line.get(key)) for line in content["metrics"]] for key in keys}
        rows[path.name] = {**content, "name": path.name, "metrics": metrics}
    file.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(file, "wt", preset=9, encoding="utf-8") as packed:
        packed.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows.values())


def rounded(value: float | None) -> float | None:
    """To six significant digits, and where it is 1 or more to six behind the point."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if abs(value) >= 1 else float(f"{value:.6g}")


def make_run(path: Path, content: dict) -> Run:
    """A run from what is in its files. UserError for files of other programs."""
    config, summaries = content["config"], content["summaries"]
    try:
        if config is not None:
            flags = config["flags"]
            run = dict(method=config["method"], model=flags["model"], seed=config["seed"], steps=flags["steps"],
                       flags=flags, changed=config.get("changed", {}))
        else:
            model = [part for part in Path(summaries[0]["model"]).parts if part != "checkpoints"]    # RUN/step-100
            name = "/".join(model[-2:])
            run = dict(method=name, model=name, seed=summaries[0]["seed"], steps=0, flags={}, changed={})
        metrics = [{**{k: float(v) for k, v in line.items() if v is not None}, "step": line["step"]}
                   for line in content["metrics"]]
        made = Run(path, **run, metrics=metrics, evals=content["evals"], summaries=summaries)
        made.scores = final_scores(made)
        return made
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise UserError(f"{path}: its files were not written by edge_grpo.py or eval.py ({type(error).__name__}: "
                        f"{error}); leave that folder out") from None


def final_scores(run: Run) -> dict[str, dict]:
    """Numbers by task: of eval.py's results where there are any (their first temperature), else of the last evaluation
    during training. Never the best of several steps. A task that eval.py measured in two ways has a column for each;
    UserError if it has measured it twice in the same way."""
    last = max((e["step"] for e in run.evals), default=None)
    scores = {e["task"]: {**e, "max_new_tokens": run.flags.get("eval_max_new_tokens")} for e in run.evals
              if e["step"] == last}
    measured = []
    for summary in run.summaries:
        temperature, result = next(iter(summary["results"].items()))
        how = {k: v for k, v in summary.get("settings", {}).items() if k in ("max_new_tokens", "context", "top_p")}
        measured += [(task, {**s, "temperature": float(temperature), **how}) for task, s in result["tasks"].items()]
    times = Counter(task for task, _ in measured)
    scores = {task: s for task, s in scores.items() if task not in times}
    for task, s in measured:
        way = f"{task} (n = {s['n']}, T = {s['temperature']:g})"
        if way in scores:
            raise UserError(f"{run.path}: its eval/ holds {way} twice, say of two seeds; move one of the folders away")
        scores[way if times[task] > 1 else task] = s
    return scores
