"""Runs read from folders and packed files, the comparison, the data of the figures, report.md."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import json_lines, refusal, write_lines

import edge_grpo
import eval as evaluation
from report import compare, page, paper, plot, runs
from report.tables import average

ROOT = Path(evaluation.__file__).parent
METHODS = {
    "sft": ("none", False),
    "grpo": ("none", False),
    "force-r": ("reflect", False),
    "force-r-eda": ("reflect", True),
    "edge-grpo": ("guided", True),
}
FLAGS = dict(model="tiny", steps=20, lr=1e-4, out="x", eval_n=1)
METRICS = [
    dict(
        step=step,
        entropy=0.5 + step,
        entropy_sampled=0.25 * step,
        advantage_variance=0.5,
        advantage_variance_eda=0.7,
        mixed_groups=0.5,
        mixed_groups_corrected=1.0,
        accuracy=0.1 * step,
        reflected=3,
        seconds_update=step,
    )
    for step in (1, 2)
]


def make_run(
    folder: Path,
    method: str,
    seed: int,
    final=(0.5,),
    tasks=("math",),
    metrics=(),
    **changed,
) -> Path:
    """A run's folder: two evaluations, of which the first is the better one, and metrics lines."""
    correction, eda = METHODS[method]
    folder.mkdir(parents=True)
    flags = {**FLAGS, "seed": seed, "correction": correction, "eda": eda, **changed}
    changed.pop("max_rows", None)  # as edge_grpo.py leaves out such flags
    config = dict(method=method, seed=seed, flags=flags, changed=changed)
    (folder / "config.json").write_text(json.dumps(config))
    evals = []
    for step, accuracies in ((10, (0.99,) * 9), (20, final)):
        for task, accuracy, problems in zip(tasks, accuracies, (100, 300)):
            row = dict(step=step, task=task, accuracy=accuracy, stderr=0.1, problems=problems)
            evals.append(row | dict(n=1, temperature=0.1))
    write_lines(folder / "evals.jsonl", evals)
    write_lines(folder / "metrics.jsonl", metrics)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')  # a line that is being written
    return folder


def results_of(
    folder: Path,
    accuracies: dict,
    model="x",
    n=1,
    seed=0,
    problems=100,
    **settings,
) -> Path:
    """A folder of eval.py's results: accuracy by temperature, or by temperature and task."""
    folder.mkdir(parents=True)
    results = {}
    for temperature, by_task in accuracies.items():
        tasks = results.setdefault(temperature, dict(tasks={}))["tasks"]
        if not isinstance(by_task, dict):
            by_task = {"math": by_task}
        for task, accuracy in by_task.items():
            tasks[task] = dict(accuracy=accuracy, stderr=0.1, problems=problems, n=n)
    summary = dict(model=model, seed=seed, settings=settings, results=results)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def cells(table: str) -> dict[str, list[str]]:
    rows = {}
    for line in table.splitlines():
        if line.startswith("|"):
            first, *others = map(str.strip, line.strip("|").split("|"))
            rows[first] = others
    return rows


def compared(*paths: Path) -> str:
    return compare.comparison(runs.read_runs(paths))


def refused(capsys, *argv) -> str:
    return refusal(capsys, evaluation.main, argv)


# --- the comparison -------------------------------------------------------------------------------


def test_published_averages_are_the_micro_averages_of_their_rows():
    assert len(paper.PUBLISHED) == 22
    for name, row in paper.PUBLISHED.items():
        if len(row) > 1:
            numbers = []
            for task, problems in zip(paper.TASKS, (30, 83, 500, 272, 675)):
                numbers.append(dict(accuracy=row[task] / 100, problems=problems))
            average = compare.micro_average(numbers)  # one is 0.013 off in print
            assert average == pytest.approx(row["average"], abs=0.015), name


def test_comparison_takes_the_last_step_and_averages_over_seeds(tmp_path):
    both = ("math", "aime")
    table = compared(
        make_run(tmp_path / "g0", "edge-grpo", 0, (0.5, 0.1), both),
        make_run(tmp_path / "g1", "edge-grpo", 1, (0.7, 0.3), both),
        make_run(tmp_path / "v", "grpo", 3, (0.4, 0.2), both),
    )
    rows = cells(table)
    assert rows["method"] == ["seeds", "math avg@1 T=0.1", "aime avg@1 T=0.1"]
    assert list(rows)[2:] == ["GRPO", "EDGE-GRPO"], "in the paper's order"
    # 20 points between two seeds are a deviation of 14.14
    assert rows["EDGE-GRPO"] == ["2", "60.0 ± 14.1", "20.0 ± 14.1"]
    assert rows["GRPO"] == ["1", "40.0", "20.0"]
    assert "NOT MEASURED ALIKE" not in table
    assert "99" not in table


def test_three_seeds_have_a_median(tmp_path):
    """10, 10 and 40 percent are 20 on average, but 10 in the middle."""
    for seed, accuracy in enumerate((0.1, 0.1, 0.4)):
        make_run(tmp_path / str(seed), "grpo", seed, (accuracy,))
    assert cells(compared(tmp_path))["GRPO"] == ["3", "20.0 ± 17.3 [10.0]"]


def test_every_way_of_sampling_has_its_column(tmp_path):
    run = make_run(tmp_path / "g", "grpo", 0)
    results_of(run / "eval" / "greedy", {"0.0": 0.25})
    results_of(run / "eval" / "avg8", {"1.0": 0.5, "0.6": 0.75}, n=8)
    columns = ["seeds", "math avg@8 T=1", "math avg@8 T=0.6", "math avg@1 T=0"]
    rows = cells(compared(run))
    assert rows["method"] == columns
    assert rows["GRPO"] == ["1", "50.0", "75.0", "25.0"]


def test_training_table_averages_over_steps_then_over_seeds(tmp_path):
    folders = []
    of_seeds = ["0 1 .5 1 .25 900", ".25 1 .5 1 .75 1"]  # mixed groups, variance after EDA
    for seed, numbers in enumerate(of_seeds):
        lines = []
        numbers = list(map(float, numbers.split()))
        for step in (1, 2, 3):
            line = dict(step=step, entropy=None, advantage_variance=0.5)
            line |= dict(seconds_sample=2 * step - 1, seconds_update=2 * step)
            line["mixed_groups"], line["advantage_variance_eda"] = numbers[2 * step - 2 : 2 * step]
            lines.append(line)
        folders.append(make_run(tmp_path / str(seed), "grpo", seed, metrics=lines))
    rows = cells(compared(*folders).split("\n\n")[2])
    row = dict(zip(rows["method"], rows["GRPO"]))
    assert row["seeds"] == "2"
    assert row["mixed"] == "0.375 ± 0.177"
    assert row["P trained"] == "–"
    assert row["seconds"] == "21.000 ± 0.000"
    assert row["Â / A"] == "2.000 ± 0.000", "of the median step: one outlier does not count"


def test_comparison_prefers_results_of_eval_and_says_what_differs(tmp_path):
    first = make_run(tmp_path / "a", "grpo", 0, (0.5,))
    second = make_run(tmp_path / "b", "grpo", 1, (0.5,), steps=40)
    results_of(first / "eval", {"0.6": 0.8}, model="runs/a/final", n=8, problems=500)
    table = compared(first, second)
    assert cells(table)["GRPO steps=40"] == ["1", "–", "50.0"]
    assert cells(table)["GRPO"] == ["1", "80.0", "–"]
    assert "- math avg@8 T=0.6: problems=500 max_new_tokens=None context=4096 top_p=1.0\n" in table
    assert "- math avg@1 T=0.1: problems=100 " in table
    assert f"{second}: last evaluated at step 20 of 40" in table
    [alone] = runs.read_runs([first / "eval"])
    assert alone.label == "runs/a/final"
    assert "80.0" in compare.comparison([alone])


def test_the_average_is_the_papers_and_over_problems(tmp_path):
    """Only where all five tasks were measured, each in one way; gsm8k is not among them."""
    both = {**dict.fromkeys(paper.PROBLEMS, 0.5), "gsm8k": 1.0}
    five = dict.fromkeys(paper.PROBLEMS, 0.25)
    a = results_of(tmp_path / "a", {"1": both}, "a")
    b = results_of(tmp_path / "b", {"1": five}, "b")
    c = results_of(tmp_path / "c", {"1": {"math": 0.1}}, "c")
    rows = cells(compared(a, b, c))
    assert rows["method"][1] == "average"
    assert [rows[label][1] for label in "abc"] == ["50.0", "25.0", "–"]
    other_way = results_of(tmp_path / "d", {"2": five})
    for paths in ([c], [a, other_way]):
        assert "average" not in cells(compared(*paths))["method"]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("metrics.jsonl", "3\n", "{}/metrics.jsonl:1: no JSON object"),
        ("config.json", '{"method": "grpo", "seed": 0, "flags": {"lr": 1}}', "{}: its files"),
        ("config.json", "{}", "{}: its files were not"),
        ("config.json", "{", "{}/config.json:1: not valid JSON"),
        ("evals.jsonl", '{"task": "math"}\n', "{}: its files were not"),
        ("summary.json", '{"results": {"0.1": {}}}', "{}: its files were not"),
    ],
)
def test_a_file_of_another_program_is_named(tmp_path, capsys, name, content, says):
    folder = make_run(tmp_path / "a", "grpo", 0)
    (folder / name).write_text(content)
    assert refused(capsys, "compare", folder).startswith("error: " + says.format(folder))


def test_a_task_measured_twice_in_the_same_way_is_not_dropped_in_silence(tmp_path, capsys):
    run = make_run(tmp_path / "g", "grpo", 0)
    results_of(run / "eval" / "s0", {"0.0": 0.25})
    assert evaluation.main(["compare", str(run)]) == 0
    results_of(run / "eval" / "s1", {"0.0": 0.5}, seed=1)
    assert "holds math, avg@1 T=0, twice" in refused(capsys, "compare", run)


@pytest.mark.parametrize("other", [dict(max_new_tokens=20), dict(top_p=0.9), {}])
def test_accuracies_measured_with_other_limits_are_marked(tmp_path, other):
    a = make_run(tmp_path / "a", "grpo", 0)
    b = make_run(tmp_path / "b", "grpo", 1)
    results_of(a / "eval", {"0.0": 0.25}, max_new_tokens=90, context=4096, top_p=1.0)
    results_of(b / "eval", {"0.0": 0.75}, **other)
    assert "- math avg@1 T=0: NOT MEASURED ALIKE: problems=100 max_new_tokens=90" in compared(a, b)


# --- paired differences ---------------------------------------------------------------------------


def test_differences_are_paired_by_seed(tmp_path, capsys):
    """Differences of 10, 20 and 30 points: mean 20, standard error 10 / sqrt 3, t = 3.46. Seed 3
    has no partner; seeds differ more than the methods do, and that must not count."""
    grpo, edge = (0.1, 0.5, 0.6), (0.2, 0.7, 0.9)
    for seed in range(3):
        make_run(tmp_path / f"g{seed}", "grpo", seed, grpo[seed : seed + 1])
        make_run(tmp_path / f"e{seed}", "edge-grpo", seed, edge[seed : seed + 1])
    make_run(tmp_path / "e3", "edge-grpo", 3, (0.0,))
    make_run(tmp_path / "f", "force-r", 0, (0.05,))
    make_run(tmp_path / "s", "sft", 7, (0.05,))
    assert evaluation.main(["compare", str(tmp_path), "--against", "GRPO"]) == 0
    parts = capsys.readouterr().out.split("\n\n")
    rows = cells(parts[2])
    assert list(rows)[2:] == ["SFT", "Force-R", "EDGE-GRPO"]
    assert rows["EDGE-GRPO"] == ["4", "+20.0 ± 5.8 (t = 3.5, n = 3)"]
    assert rows["Force-R"] == ["1", "-5.0 (n = 1)"]
    assert rows["SFT"] == ["1", "–"]
    assert parts[3].startswith("Differences to GRPO in points, paired by seed")
    sentence = refused(capsys, "compare", tmp_path, "--against", "grpo")
    assert "there are ['SFT', 'GRPO', 'Force-R', 'EDGE-GRPO']" in sentence
    make_run(tmp_path / "again", "grpo", 0)
    assert "- GRPO: 2 of its runs have the seed 0" in compared(tmp_path)
    sentence = refused(capsys, "compare", tmp_path, "--against", "GRPO")
    assert "two runs of one label have the same seed" in sentence


# --- labels ---------------------------------------------------------------------------------------


def labels_of(paths: list[Path]) -> dict[str, str]:
    return {r.path.name: r.label for r in runs.read_runs(paths)}


def test_runs_are_labelled_by_the_flags_that_were_changed(tmp_path):
    paths = [
        make_run(tmp_path / "a", "edge-grpo", 0),
        make_run(tmp_path / "b", "edge-grpo", 1, eval_n=4, max_rows=3),
        make_run(tmp_path / "c", "edge-grpo", 0, correction="none"),
        make_run(tmp_path / "d", "grpo", 0, eda=True),
        make_run(tmp_path / "e", "edge-grpo", 0, eda=False),
        make_run(tmp_path / "g", "edge-grpo", 0, lr=1e-5, guided_probs=[0.5, 0, 0.5]),
        make_run(tmp_path / "h", "edge-grpo", 0, model="runs/new/sft-seed3/final"),
        make_run(tmp_path / "i", "edge-grpo", 1, model="runs/new/sft-seed4/final"),
    ]
    assert labels_of(paths) == dict(
        a="EDGE-GRPO",
        b="EDGE-GRPO",
        c="EDGE-GRPO correction=none",
        d="GRPO eda=True",
        e="EDGE-GRPO eda=False",
        g="EDGE-GRPO lr=1e-05 guided_probs=[0.5,0,0.5]",
        h="EDGE-GRPO model=runs/new/sft/final",  # the warm start of each seed is one experiment
        i="EDGE-GRPO model=runs/new/sft/final",
    )
    folders = [results_of(tmp_path / name, {"1": 0.5}, f"runs/{name}/final") for name in "AB"]
    assert labels_of(folders) == {"A": "runs/A/final", "B": "runs/B/final"}


def test_what_all_runs_of_a_method_changed_stands_below_and_not_in_their_labels(tmp_path):
    paths = [
        make_run(tmp_path / "a", "edge-grpo", 0, lr=3e-4, temperature=1.0),
        make_run(tmp_path / "b", "edge-grpo", 0, temperature=1.0),
        make_run(tmp_path / "g", "grpo", 0, metrics=METRICS),
    ]
    assert labels_of(paths) == {
        "a": "EDGE-GRPO lr=0.0003",
        "b": "EDGE-GRPO",
        "g": "GRPO",
    }
    assert compared(*paths).endswith("\n- all runs of EDGE-GRPO: temperature=1.0")


def test_a_default_that_has_changed_and_a_flag_that_is_new(tmp_path):
    """A default of its time is named where another run has another; an older run counts as one
    that did not change the flag."""
    paths = []
    for name in "abcd":
        paths.append(make_run(tmp_path / name, "edge-grpo", len(paths)))
        file = paths[-1] / "config.json"
        config = json.loads(file.read_text())
        if name == "a":
            config["flags"]["steps"] = 60
        if name == "c":
            config["flags"]["guide"] = "every"
        if name == "d":
            config["flags"]["guide"] = config["changed"]["guide"] = "all-wrong"
        file.write_text(json.dumps(config))
    assert labels_of(paths) == dict(
        a="EDGE-GRPO steps=60",
        b="EDGE-GRPO steps=20",
        c="EDGE-GRPO steps=20",
        d="EDGE-GRPO steps=20 guide=all-wrong",
    )


def test_other_folders_are_searched_or_skipped_with_a_note(tmp_path, capsys):
    folder = tmp_path / "runs"
    make_run(folder / "tiny" / "a", "grpo", 0)
    make_run(folder / "b", "grpo", 1)
    (folder / "figures").mkdir()
    (folder / "README.md").write_text("")
    paths = map(str, sorted(folder.iterdir()))
    assert evaluation.main(["compare", *paths]) == 0
    said = capsys.readouterr()
    assert cells(said.out)["GRPO"][0] == "2"
    assert said.err.startswith("skipped")
    assert said.err.endswith(f": {folder / 'README.md'}, {folder / 'figures'}\n")
    sentence = refused(capsys, "compare", folder / "figures")
    assert sentence.startswith(f"error: {folder / 'figures'}: no run")


# --- packed runs ----------------------------------------------------------------------------------


def test_packed_runs_are_read_as_the_folders_they_were_made_from(tmp_path, capsys):
    first, second = METRICS
    metrics = [first | dict(accuracy=None, loss=0.5), second | dict(loss=-0.246913578)]
    folder = tmp_path / "runs"
    folders = []
    for seed in (0, 1):
        path = folder / f"g{seed}"
        folders.append(make_run(path, "grpo", seed, (seed / 7,), metrics=metrics, lr=1e-5))
    folders.append(results_of(folder / "only-results", {"0.0": 0.3}))
    results_of(folders[0] / "eval" / "avg8", {"0.0": 1 / 3}, n=8)
    file, again = tmp_path / "all.jsonl.xz", tmp_path / "again.jsonl.xz"
    argv = ["pack", *folders, "--out", file]
    assert evaluation.main(list(map(str, argv))) == 0
    assert capsys.readouterr().out == f"{file}\n"
    fresh, packed = runs.read_runs(folders), runs.read_runs([file])
    for a, b in zip(fresh, packed, strict=True):
        assert b.path == file / a.path.name
        assert replace(b, path=a.path, metrics=a.metrics) == a
        for ours, theirs in zip(a.metrics, b.metrics, strict=True):
            if ours["loss"] < 0:
                ours["loss"] = -0.247
            assert theirs == ours
    same = compare.comparison(packed).replace(str(file), str(folder))
    assert compare.comparison(fresh) == same
    assert evaluation.main(["pack", str(file), "--out", str(again)]) == 0
    assert again.read_bytes() == file.read_bytes(), "packing is a function of what is packed"


def test_a_glob_behind_a_packed_file_chooses_runs(tmp_path, capsys):
    file = tmp_path / "all.jsonl.xz"
    folders = [make_run(tmp_path / name, "grpo", 0) for name in ("T0.6-a", "T0.6-b", "c")]
    runs.pack(file, folders)
    chosen = runs.read_runs([f"{file}/T0.6-*", f"{file}/T0.6-a"])
    assert [run.path.name for run in chosen] == ["T0.6-a", "T0.6-b"]
    other = make_run(tmp_path / "elsewhere" / "c", "grpo", 0)
    for argv, says in (
        (["compare", f"{file}/d*"], f"{file}/d*: no run"),
        (["pack", folders[2], other, "--out", file], "another run is also named c"),
        (["pack", other, "--out", tmp_path / "all.json"], "ends in .jsonl.xz"),
    ):
        assert says in refused(capsys, *argv)


@pytest.mark.parametrize("share", [0.5, 0])
def test_a_packed_file_that_is_cut_off_is_reported_in_one_sentence(tmp_path, capsys, share):
    file = tmp_path / "all.jsonl.xz"
    runs.pack(file, [make_run(tmp_path / "a", "grpo", 0)])
    os.truncate(file, int(share * file.stat().st_size))
    assert str(file) in refused(capsys, "compare", file)


# --- the evidence ---------------------------------------------------------------------------------

RESULTS = ROOT / "results"
EVIDENCE = sorted(RESULTS.rglob("*.jsonl.xz"))


def test_the_evidence_is_small_and_every_run_of_it_can_be_compared():
    names = paper.METHODS.values()
    for file in EVIDENCE:
        found = runs.read_runs([file])
        trained = [run for run in found if run.steps]
        assert len(trained) >= 3 and all(run.method in names for run in trained), file
        assert all(run.results for run in found), file
        assert compare.comparison(found)
    files = [path for path in RESULTS.rglob("*.*") if path.suffix != ".pyc"]
    sizes = [path.stat().st_size for path in files]
    assert len(sizes) <= 60
    assert sum(sizes) <= 3_000_000


def test_the_real_models_table_is_that_of_its_packed_runs():
    """Every row of the first table in results/smollm2/README.md that is a training run."""
    table = {}
    for line in (RESULTS / "smollm2" / "README.md").read_text("utf-8").splitlines():
        row = line.strip("| ").split(" | ")
        if len(row) == 11 and row[1] in ("1", "2"):
            table[row[0], row[1]] = row
    names = dict(grpo="GRPO", edge="EDGE-GRPO", sft="SFT goes on")
    names["no-answers"] = "EDGE-GRPO without answers"
    for run in runs.read_runs([RESULTS / "smollm2" / "runs.jsonl.xz" / "*-seed?"]):
        name = names[run.path.name.split("-seed")[0]]
        row = table.pop((name, str(run.seed)))
        own, test = run.results["gsm8k-train", "avg@8 T=0.6"], run.results["gsm8k", "avg@1 T=0.1"]
        percent = [f"{100 * r['accuracy']:.1f} ± {100 * r['stderr']:.1f}" for r in (own, test)]
        assert row[2:5] == [percent[0], f"{100 * own['pass@8']:.0f}", percent[1]]
        pairs = []
        for key, end in (("mixed_groups", "_corrected"), ("advantage_variance", "_eda")):
            before, after = average(run.metrics, key), average(run.metrics, key + end)
            if before is not None:
                pairs.append(f"{before:.2f} → {after:.2f}")
        assert row[5:7] == (pairs or ["–", "–"])
    assert not table


# --- figures --------------------------------------------------------------------------------------


def test_curve_smooths_each_seed_and_takes_the_steps_they_share():
    first = [(1, 0.0, 0), (2, 1.0, 0), (3, 2.0, 0)]
    second = [(1, 4.0, 0), (2, 6.0, 0), (3, 2.0, 0), (4, 9.0, 0)]
    # Two values with a difference of d have the standard error d / 2.
    both = [(1, 2.0, 2.0), (2, 2.75, 2.25), (3, 2.75, 1.25)]
    assert plot.curve([first, second], window=2) == both
    assert plot.curve([second, first], window=2) == both
    assert plot.curve([first], window=1) == first


def test_the_figures_data(tmp_path):
    unknown = dict.fromkeys(("accuracy", "entropy_sampled", "mixed_groups"))
    unsampled = [{**line, **unknown, "reflected": 0} for line in METRICS]
    a = make_run(tmp_path / "a", "grpo", 0, metrics=METRICS)
    b = make_run(tmp_path / "b", "sft", 0, metrics=unsampled)
    figures = plot.all_panels(runs.read_runs([a, b]), window=2)
    assert {name: len(panels) for name, panels in figures.items()} == {
        "entropy": 2,
        "advantage": 4,
        "accuracy": 2,
    }
    sampled, trained = figures["entropy"]
    assert "as sampled" in sampled.title
    assert "last 2" in sampled.xlabel
    smoothed = [(1, 0.25, 0), (2, 0.375, 0)]
    assert sampled.lines == {"GRPO": smoothed}, "SFT samples nothing"
    assert set(trained.lines) == {"SFT", "GRPO"}
    held_out = figures["accuracy"][0]
    assert "math" in held_out.title and held_out.xlabel == "step", "evaluations are not smoothed"
    assert held_out.lines["GRPO"] == [(10, 0.99, 0.1), (20, 0.5, 0.1)]


def test_a_line_of_accuracies_is_over_the_same_problems(tmp_path):
    """64 problems between, all at the end: a line through both would jump where nothing is new."""
    run = make_run(tmp_path / "a", "grpo", 0)
    evals = []
    for step, problems in ((10, 64), (20, 64), (30, 256)):
        row = dict(task="math", accuracy=0.5, stderr=0.1, n=1, temperature=0.0)
        evals.append(row | dict(step=step, problems=problems))
    write_lines(run / "evals.jsonl", evals)
    [panel] = plot.all_panels(runs.read_runs([run]), window=1)["accuracy"]
    assert panel.lines["GRPO"] == [(10, 0.5, 0.1), (20, 0.5, 0.1)]


def test_relative_entropy_is_drawn_by_kind_of_row_and_left_out_where_unknown(tmp_path):
    known = []
    for line in METRICS:
        kinds = dict(relative_entropy_right=None, relative_entropy_wrong=1.2)
        known.append(line | kinds | dict(relative_entropy_reference=0.02 * line["step"]))
    a = make_run(tmp_path / "a", "edge-grpo", 0, metrics=known)
    b = make_run(tmp_path / "b", "grpo", 0, metrics=METRICS)  # an older run
    begun = make_run(tmp_path / "begun", "edge-grpo", 1, metrics=[])
    [panel] = plot.all_panels(runs.read_runs([begun, a]), window=1)["relative_entropy"]
    assert panel.lines == {
        "wrong responses": [(1, 1.2, 0), (2, 1.2, 0)],
        "references": [(1, 0.02, 0), (2, 0.04, 0)],
    }
    assert panel.title.endswith("EDGE-GRPO")
    both = plot.all_panels(runs.read_runs([a, b]), window=1)
    assert both["relative_entropy"] == [panel]


def test_figures_2_and_3_are_drawn_by_temperature(tmp_path):
    folder = results_of(tmp_path / "r", {"1": 0.5, "0.1": 0.25}, model="runs/m/final")
    summary = json.loads((folder / "summary.json").read_text())
    warm, cold = summary["results"].values()
    side = dict(ratio=1.5, correct_above=0.25, wrong_below=0.5)
    warm["entropy"] = dict(average=0.1, overall=side, within=None)
    warm["entropy"] |= dict(P_correct=[0.1], P_wrong=[0.2, 0.2, 0.4])
    cold["entropy"] = {}
    for result in (warm, cold):
        result["reflection"] = dict(accuracy=0.5, accuracy_reflecting=None, gain=0.2)
    (folder / "summary.json").write_text(json.dumps(summary))
    figures = plot.all_panels(runs.read_runs([folder]), window=1)
    accuracy, gain = figures["figure2"]
    assert list(accuracy.lines.values()) == [[(0.1, 0.5, 0), (1.0, 0.5, 0)]]
    assert list(gain.lines.values()) == [[(0.1, 0.2, 0), (1.0, 0.2, 0)]]
    by_title = {panel.title: panel.lines for panel in figures["figure3"]}
    assert by_title["Mean P, wrong / right"] == {"runs/m/final": [(1.0, 1.5, 0)]}
    assert len(by_title) == 3, "within each question nothing is known"
    [panel] = figures["entropy_histogram"]
    shares = [share for _, share, _ in panel.lines["wrong responses"] if share]
    assert shares == pytest.approx([2 / 3, 1 / 3])
    assert panel.title.endswith(str(folder))
    assert "T = 1" in panel.title


def test_plot_writes_one_png_per_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is only needed to draw")
    for seed in (0, 1):
        make_run(tmp_path / f"run{seed}", "grpo", seed, metrics=METRICS)
    out = tmp_path / "figures"
    assert evaluation.main(["plot", str(tmp_path), "--out", str(out)]) == 0
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["accuracy.png", "advantage.png", "entropy.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == list(map(str, files))


def test_an_axis_holds_every_point(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is only needed to draw")
    points = [(1, 0.1, 0.0), (2, 3.0, 0.5)]
    panel = plot.Panel("x", "step", {"a": points})
    _, axis = pyplot.subplots()
    plot.draw_panel(axis, panel, {"a": ("-", "#000000")})
    low, high = axis.get_ylim()
    assert low <= 0
    assert high >= 3.5
    pyplot.close("all")


def test_plot_without_matplotlib_or_data_says_so(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "a", "grpo", 0, metrics=METRICS)
    empty = results_of(tmp_path / "b", {"1": {}})
    out = "--out", tmp_path
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(capsys, "plot", run, *out)
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(use=lambda name: None))
    assert "nothing to draw" in refused(capsys, "plot", empty, *out)
    assert "nothing to compare" in refused(capsys, "compare", empty)


def test_a_reader_that_has_seen_enough_ends_the_command_in_silence():
    """`eval.py compare ... | head`: the pipe is closed before anything is written."""
    argv = [sys.executable, "eval.py", "compare", str(EVIDENCE[0])]
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdout=pipe, stderr=pipe, cwd=ROOT)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


# --- report.md ------------------------------------------------------------------------------------

CONFIG = dict(wrong_references=[], problems_left_out=[], problems=9)
HEALTHY = dict(
    skipped_updates=0,
    mixed_groups=0.4,
    mixed_groups_corrected=0.9,
    advantage_variance=0.9,
    grad_norm=1.0,
    entropy=0.4,
    logprob_gap=1e-6,
    truncated=0.0,
)


@pytest.mark.parametrize(
    "late, says",
    [
        ({}, None),
        (dict(grad_norm=0.0), "diverged"),
        (dict(grad_norm=0.0, advantage_variance=0.0), None),  # collapsed groups have no gradient
        (dict(entropy=5.7, advantage_variance=0.0), "diverged"),  # ln 308 = 5.73
        (dict(mixed_groups_corrected=0.1), "lowered the share of mixed groups from 40.0% to"),
        (dict(skipped_updates=1), "skipped"),
        (dict(logprob_gap=2.0), "sampler and trainer differ"),
        (dict(truncated=1.0), "were cut at"),
    ],
)
def test_warnings_of_a_run(late, says):
    metrics = [HEALTHY] * 4 + [HEALTHY | late] * 16
    found = page.warnings(metrics, CONFIG)
    assert len(found) == (says is not None) and (not found or says in found[0])


def test_the_summary_is_of_the_first_and_the_last_tenth():
    evals, metrics = [], []
    for step in (0, 2, 4):
        evals.append(dict(step=step, task="t", accuracy=step / 10, stderr=0.1))
    for step in (1, 2, 3, 4):
        line = dict(step=step, accuracy=step / 10, loss=-step)
        metrics.append(line | dict(mixed_groups=0.1, mixed_groups_corrected=0.1))
    rows = cells(page.summary(metrics, evals))
    assert rows[""] == ["first 1 of 4 steps", "last 1 of 4 steps"]
    assert rows["accuracy, sampled (%)"] == ["10.0", "40.0"]
    assert rows["loss"] == ["-1", "-4"]
    assert rows["held-out accuracy, t, before and after (%)"] == ["0.0 ± 10.0", "40.0 ± 10.0"]


def test_what_eda_sees_is_shown_early_and_late():
    metrics = []
    for step in range(20):
        ratio = 0.1 if step < 10 else 0.9
        line = dict(relative_entropy_reference=ratio, advantage_share_reference=ratio / 2)
        metrics.append(line | dict(relative_entropy_right=None, advantage_share_right=0.0))
    rows = cells(page.kinds_of_rows(metrics))
    assert list(rows)[0] == "first and last 2 of 20 steps"
    assert rows["references"] == ["0.10", "5.0", "0.90", "45.0"]
    assert len(rows) == 3
    assert page.kinds_of_rows(METRICS) is None, "an older run"


def test_a_diverged_run_says_so_and_a_fence_holds_what_a_model_wrote(tmp_path, capsys):
    argv = "--steps 4 --questions-per-step 1 --lr 1e6 --max-new-tokens 16 --correction-tokens 8"
    out = tmp_path / "run"
    argv = [*argv.split(), "--eval-tasks", "--out", str(out)]
    assert edge_grpo.main(argv) == 0
    assert "warning: the model diverged" in capsys.readouterr().out
    assert "**Warning:** the model diverged" in (out / "report.md").read_text("utf-8")
    rows = json_lines(out / "samples.jsonl")
    for row in rows:
        row["segments"] = [["````python\n\x1b[2J\u202e```", False]]
    write_lines(out / "samples.jsonl", rows)
    page.conclude(SimpleNamespace(out=str(out), steps=4, sft=False))
    text = (out / "report.md").read_text("utf-8")
    assert text.count("\n`````\n") == 6, "three groups, each between longer fences"
    assert "````python\n   \\x1b[2J\\u202e```" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
