"""Runs, as `compare` and `plot` read them: a folder of edge_grpo.py, a folder of eval.py's results, or a packed file.

A packed file, NAME.jsonl.xz, has a line for each run: its name, config.json, metrics.jsonl (a list per key),
evals.jsonl and all summary.json. It is read as if it were a folder of these runs, so that a glob behind it chooses some
of them: results/tiny.jsonl.xz/edge-*
"""

import json
import lzma
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from engine.flags import MAY_CHANGE
from engine.folder import read_json, read_lines
from errors import UserError
from report.paper import METHODS
from report.tables import group

WORDS = {  # of the flags whose own names are longer or say less
    "temperature": "T = {:g}",
    "lr": "lr {:g}",
    "steps": "{} steps",
    "data": "{}",
    "model": "{}",
    "loss": "{} loss",
    "group_size": "G = {}",
    "kl": "KL × {:g}",
    "injected_weight": "injected × {:g}",
    "eda_grad": "gradient through P",
    "all_wrong_advantage": "A = {:g} where all are wrong",
}
SWITCHES = {"correction", "sft", "eda"}  # what makes a method
APART = MAY_CHANGE | {
    "profile",
    "seed",
    "method",
}  # what makes no other experiment, or stands elsewhere


@dataclass
class Run:
    path: Path
    method: str  # its name in tables; of results alone: the model
    seed: int
    steps: int = 0  # of training
    flags: dict[str, str] = field(default_factory=dict)  # in words
    changed: set[str] = field(
        default_factory=set
    )  # those that differ from the model's and method's defaults
    metrics: list[dict] = field(
        default_factory=list
    )  # a step's numbers, without those that are not defined
    evals: list[dict] = field(default_factory=list)
    scores: dict[tuple, dict] = field(default_factory=dict)  # by (task, way of sampling)
    label: str = ""  # runs with the same label differ in their seed only
    usual: list[str] = field(default_factory=list)  # changed flags that the label does not name


def read_runs(paths: list[str]) -> list[Run]:
    """The runs, labelled, in the order of METHODS. UserError where there is none."""
    runs = [make_run(path, content) for path, content in contents(paths).items()]
    methods = group(runs, lambda r: r.method)
    for alike in methods.values():
        label_runs(alike, len(methods) == 1)
    order = {name: i for i, (name, _) in enumerate(METHODS.values())}
    return sorted(runs, key=lambda r: order.get(r.method.partition(",")[0], -1))


def label_runs(runs: list[Run], alone: bool) -> None:
    """Label the runs of a method by what differs from the value that most of them have, or else from the default. Where
    there is no other method, its name is left out of labels that have another word."""
    named = [[] for _ in runs]

    def differs(flag: str) -> bool:
        return (
            any(flag in r.changed for r in runs)
            or len({r.flags[flag] for r in runs if flag in r.flags}) > 1
        )

    for flag in dict.fromkeys(flag for r in runs for flag in r.flags if differs(flag)):
        defaults = [r.flags[flag] for r in runs if flag in r.flags.keys() - r.changed]
        default = defaults[0] if defaults else f"default {flag}"
        told = [r.flags.get(flag, default) for r in runs]  # a run may be older than the flag
        [(most, count)] = Counter(told).most_common(1)
        usual = most if count > len(runs) / 2 else default
        for said, r, own in zip(told, runs, named):
            own += [said] if said != usual else []
            r.usual += [usual] if usual not in (default, *defaults) else []
    for r, own in zip(runs, named):
        r.label = ", ".join(own if own and alone else [r.method, *own])


def words(flag: str, value: object) -> str:
    plain = flag.replace("_", " ")
    if flag == "guided_probs":
        without = [
            branch for branch, p in zip(("reflections", "answers", "references"), value) if p == 0
        ]
        plain = f"without {' and '.join(without)}" if without else "guided"
        plain += ", with prefixes" if sum(value[3:]) else ""
        return f"{plain} ({'/'.join(f'{p:g}' for p in value)})"
    if flag == "eda_clamp" and value:
        return "EDA clamp " + " and ".join(
            f"{lo:g}–{hi:g}" for lo, hi in zip(value[::2], value[1::2])
        )
    if flag == "model" and (
        run := re.search(r"([^/]+?)(-seed\d+)?/final/?$", value)
    ):  # a warm start for each seed
        return f"from {run[1]}"
    if flag in WORDS and value is not False:
        return WORDS[flag].format(value)
    if isinstance(value, bool):
        return plain if value else f"no {plain}"
    return f"{plain} {value}"


def contents(paths: list[str]) -> dict[Path, dict]:
    """What is in the files of each run, by the run's path; what is no run is skipped with a note."""
    runs, skipped = {}, []
    for given in map(Path, paths):
        here = dict(found(given))
        runs.update(here)
        skipped += [] if here else [str(given)]
    if not runs:
        raise UserError(
            f"{skipped[0]}: no run (config.json), no results of eval.py (summary.json) and no packed runs "
            "(.jsonl.xz) of that name"
        )
    if skipped:
        print(f"skipped, as there are no runs in them: {', '.join(skipped)}", file=sys.stderr)
    return runs


def found(given: Path) -> Iterator[tuple[Path, dict]]:
    """The run that a path names; those below the folder; or those of the packed file, or of the glob behind it."""
    file = next((p for p in (given, *given.parents) if p.is_file() and p.suffix == ".xz"), None)
    if file is not None:
        wanted = "*" if given == file else str(given.relative_to(file))
        yield from (
            (file / row["name"], row) for row in read_packed(file) if fnmatch(row["name"], wanted)
        )
    elif (given / "config.json").exists() or (given / "summary.json").exists():
        config, summaries = (
            given / "config.json",
            {*given.glob("summary.json"), *given.glob("eval/**/summary.json")},
        )
        yield (
            given,
            dict(
                config=read_json(config) if config.exists() else None,
                metrics=read_lines(given / "metrics.jsonl")[0],
                evals=read_lines(given / "evals.jsonl")[0],
                summaries=[read_json(summary) for summary in sorted(summaries)],
            ),
        )
    elif given.is_dir():
        for child in sorted(given.iterdir()):
            yield from found(child)


def read_packed(file: Path) -> list[dict]:
    try:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    except (lzma.LZMAError, EOFError, ValueError):
        raise UserError(
            f"{file}: damaged, or no file of packed runs (eval.py pack); get it anew"
        ) from None
    return [
        {
            **row,
            "metrics": [
                dict(zip(row["metrics"], values)) for values in zip(*row["metrics"].values())
            ],
        }
        for row in rows
    ]


def pack(file: Path, paths: list[str]) -> None:
    """Write the runs to a packed file: everything that `compare` and `plot` read, numbers of steps to 6 digits."""
    if not file.name.endswith(".jsonl.xz"):
        raise UserError(f"--out {file}: the name of a file of packed runs ends in .jsonl.xz")
    rows = {}
    for path, content in contents(paths).items():
        make_run(path, content)  # only what can be read again is packed
        if path.name in rows:
            raise UserError(
                f"{path}: another run has the name {path.name} too; pack them into two files"
            )
        metrics = {
            key: [rounded(line.get(key)) for line in content["metrics"]]
            for key in dict.fromkeys(key for line in content["metrics"] for key in line)
        }
        rows[path.name] = {**content, "name": path.name, "metrics": metrics}
    file.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(file, "wt", encoding="utf-8") as packed:
        packed.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows.values())


def rounded(v: object) -> object:
    """A float to six significant digits, and where it is 1 or more to six behind the point."""
    return v if not isinstance(v, float) else round(v, 6) if abs(v) >= 1 else float(f"{v:.6g}")


def make_run(path: Path, content: dict) -> Run:
    """A run from what is in its files. UserError for files of other programs."""
    config, summaries = content["config"], content["summaries"]
    try:
        if config is None:
            model = [
                part for part in Path(summaries[0]["model"]).parts if part != "checkpoints"
            ]  # RUN/step-100
            run = Run(path, "/".join(model[-2:]), summaries[0]["seed"])
        else:
            flags = {
                k: v
                for k, v in config["flags"].items()
                if not k.startswith("eval_") and k not in APART
            }
            changed = {"model": flags["model"], **config["changed"]}
            said = {flag: words(flag, value) for flag, value in flags.items()}
            run = Run(
                path,
                method_name(config["method"], changed),
                config["seed"],
                flags["steps"],
                said,
                changed.keys() & said.keys() - SWITCHES,
            )
        run.metrics = [
            {**{k: float(v) for k, v in line.items() if v is not None}, "step": int(line["step"])}
            for line in content["metrics"]
        ]
        run.evals = content["evals"]
        run.scores = final_scores(
            run, summaries, config["flags"].get("eval_max_new_tokens") if config else None
        )
        return run
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise UserError(
            f"{path}: its files were not written by edge_grpo.py or eval.py ({type(error).__name__}: "
            f"{error}); leave that folder out"
        ) from None


def method_name(method: str, changed: dict) -> str:
    """As in the README's tables; a switched correction or EDA makes another method."""
    known = METHODS.get((method, changed.get("eda")))
    name, _ = known or METHODS.get((method, None), (method, None))
    switched = [flag for flag in changed if flag in SWITCHES and not (flag == "eda" and known)]
    return ", ".join([name, *(words(flag, changed[flag]) for flag in switched)])


def final_scores(run: Run, summaries: list[dict], max_new_tokens: int | None) -> dict[tuple, dict]:
    """Numbers by (task, way of sampling): of eval.py's results where there are any (their first temperature), else of
    the last evaluation during training. Never the best of several steps. UserError for two of the same kind."""
    last = max((e["step"] for e in run.evals), default=None)
    trained = [
        (e["task"], {**e, "max_new_tokens": max_new_tokens}) for e in run.evals if e["step"] == last
    ]
    measured = []
    for summary in summaries:
        T, result = next(iter(summary["results"].items()))
        measured += [
            (task, {**summary.get("settings", {}), **s, "temperature": float(T)})
            for task, s in result["tasks"].items()
        ]
    again = {task for task, _ in measured}
    scores = {}
    for task, s in [pair for pair in trained if pair[0] not in again] + measured:
        n, T = s["n"], s["temperature"]
        way = "greedy" if n == 1 and T == 0 else f"T={T:g}" if n == 1 else f"avg@{n} T={T:g}"
        if (task, way) in scores:
            raise UserError(
                f"{run.path}: its eval/ holds {task}, {way}, twice, say of two seeds; move one of the "
                "folders away"
            )
        scores[task, way] = s
    return scores
