"""results/: runs read from folders and from packed files, the tables of the comparison, the data of the figures."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
from data import UserError
from results import compare, paper, plot, runs


# --- published numbers ----------------------------------------------------------------------------------------------

def test_published_averages_are_the_micro_averages_of_their_rows():
    assert len(paper.PUBLISHED) == 22
    for name, row in paper.PUBLISHED.items():
        if len(row) > 1:
            numbers = [dict(accuracy=row[t], problems=n) for t, n in zip(paper.TASKS, (30, 83, 500, 272, 675))]
            average = compare.micro_average(numbers)
            assert average == pytest.approx(row["average"], abs=0.015), name     # one is 0.013 off in print


# --- runs and their comparison ---------------------------------------------------------------------------------------

METHODS = {"sft": ("none", False), "grpo": ("none", False), "force-r": ("reflect", False),
           "force-r-eda": ("reflect", True), "edge-grpo": ("guided", True)}
FLAGS = dict(model="tiny", seed=0, steps=20, correction="guided", eda=True, lr=1e-4, out="x", eval_n=1)


def make_run(folder: Path, method: str, seed: int, final=(0.5,), tasks=("math",), metrics=(), **changed) -> Path:
    """A run's folder: two evaluations, of which the first is the better one, and the given metrics lines."""
    correction, eda = METHODS[method]
    folder.mkdir(parents=True)
    flags = {**FLAGS, "seed": seed, "correction": correction, "eda": eda, "out": str(folder), **changed}
    changed = {k: v for k, v in changed.items() if k != "max_rows"}         # as edge_grpo.py leaves out such flags
    (folder / "config.json").write_text(json.dumps(dict(method=method, seed=seed, flags=flags, changed=changed)))
    evals = [dict(step=step, task=t, accuracy=a, stderr=0.1, problems=p, n=1, temperature=0.1) for step in (10, 20)
             for t, a, p in zip(tasks, final if step == 20 else (0.99,) * 9, (100, 300))]
    (folder / "evals.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evals))
    written = "".join(json.dumps(m) + "\n" for m in metrics)
    (folder / "metrics.jsonl").write_text(written + '{"step": 9')                         # a line is just being written
    return folder


def test_a_task_measured_in_two_ways_has_two_columns_and_no_average(tmp_path):
    run = make_run(tmp_path / "g", "grpo", 0)
    for name, n, temperature, accuracy in (("greedy", 1, "0.0", 0.25), ("avg8", 8, "1.0", 0.5)):
        (run / "eval" / name).mkdir(parents=True)
        task = dict(accuracy=accuracy, stderr=0.1, problems=100, n=n)
        (run / "eval" / name / "summary.json").write_text(json.dumps(dict(
            model="x", seed=0, results={temperature: dict(tasks={"math": task})})))
    scores = runs.read_runs([run])[0].scores
    accuracies = {key: s["accuracy"] for key, s in scores.items()}
    assert accuracies == {"math (n = 8, T = 1)": 0.5, "math (n = 1, T = 0)": 0.25}
    assert cells(compare.comparison(runs.read_runs([run])).split("\n\n")[0])["grpo"][1] == "–"


def test_training_table_averages_over_steps_then_over_seeds(tmp_path):
    lines = lambda a, b: [dict(step=1, mixed_groups=a, entropy=None, seconds_sample=1, seconds_update=2),
                          dict(step=2, mixed_groups=b, entropy=None, seconds_sample=3, seconds_update=4)]
    paths = [make_run(tmp_path / "a", "grpo", 0, metrics=lines(0.0, 0.5)),
             make_run(tmp_path / "b", "grpo", 1, metrics=lines(0.25, 0.5))]
    row = cells(compare.training_table(runs.read_runs(paths)))["grpo"]
    assert row[0] == "0.312 ± 0.088" and row[5] == "–" and row[-1] == "10 ± 0"


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_comparison_takes_the_last_step_and_averages_over_seeds(tmp_path):
    both = ("math", "aime")
    paths = [make_run(tmp_path / "g0", "edge-grpo", 0, (0.5, 0.1), both),
             make_run(tmp_path / "g1", "edge-grpo", 1, (0.7, 0.3), both),
             make_run(tmp_path / "v", "grpo", 3, (0.4, 0.2), both)]
    table = compare.comparison(runs.read_runs(paths))
    rows = cells(table)
    assert rows["method"] == ["n (seeds)", "average", "aime", "math"], "the benchmarks stand in the paper's order"
    assert list(rows)[2:] == ["grpo", "edge-grpo"], "so do the methods"
    # 100 problems of math and 300 of aime; a difference of 20 points between two seeds is a standard deviation of 14.14
    assert rows["edge-grpo"] == ["2 (0, 1)", "30.00 ± 14.14", "20.00 ± 14.14", "60.00 ± 14.14"]
    assert rows["grpo"] == ["1 (3)", "25.00", "20.00", "40.00"]
    assert "NOT MEASURED ALIKE" not in table and "99" not in table


def test_comparison_prefers_results_of_eval_and_says_what_differs(tmp_path):
    first = make_run(tmp_path / "a", "grpo", 0, (0.5,))
    second = make_run(tmp_path / "b", "grpo", 1, (0.5,), steps=40)
    numbers = dict(problems=500, n=8, accuracy=0.8)
    (first / "eval").mkdir()
    (first / "eval" / "summary.json").write_text(json.dumps(dict(model="runs/a/final", seed=0, n=8, results={
        "0.6": dict(tasks={"math": numbers}, all=numbers), "1": dict(tasks={"math": {**numbers, "accuracy": 0.1}})})))
    table = compare.comparison(runs.read_runs([first, second]))
    assert "grpo steps=20" in table and "80.00" in table and "10.00" not in table
    assert "NOT MEASURED ALIKE: 100 problems, n = 1, T = 0.1; 500 problems, n = 8, T = 0.6" in table
    assert f"{second}: last evaluated at step 20 of 40" in table
    alone = runs.read_runs([first / "eval"])
    assert alone[0].label == "a/final" and "80.00" in compare.comparison(alone)


def test_the_average_is_over_the_papers_tasks_or_the_common_ones(tmp_path):
    def average(name: str, *tasks: dict) -> list[str]:
        paths = []
        for seed, accuracies in enumerate(tasks):
            numbers = {task: dict(problems=100, n=1, accuracy=a) for task, a in accuracies.items()}
            paths.append(tmp_path / f"{name}{seed}")
            paths[-1].mkdir()
            (paths[-1] / "summary.json").write_text(json.dumps(dict(model=str(seed), seed=seed, n=1,
                                                                    results={"1": dict(tasks=numbers)})))
        return [row[1] for row in cells(compare.comparison(runs.read_runs(paths))).values()][2:]

    five = dict.fromkeys(paper.TASKS, 0.5)
    assert average("a", {**five, "gsm8k": 1.0}) == ["50.00"], "gsm8k is not in the paper's average"
    assert average("b", {"math": 0.1, "gsm8k": 0.9}, {"math": 0.2}) == ["10.00", "20.00"]
    assert average("c", {"math": 0.1}, {"gsm8k": 0.2}) == ["–", "–"]


def test_a_task_that_was_not_evaluated_at_the_last_step_is_not_taken_from_an_earlier_one(tmp_path):
    run = make_run(tmp_path / "a", "grpo", 0, (0.5,))
    with open(run / "evals.jsonl", "a") as f:
        f.write(json.dumps(dict(step=10, task="aime", accuracy=0.9, problems=30, n=1, temperature=0.1)) + "\n")
    assert list(runs.read_runs([run])[0].scores) == ["math"]


@pytest.mark.parametrize("name, content", [
    ("metrics.jsonl", "3\n"), ("metrics.jsonl", '{"step": 1, "mixed_groups": "x"}\n'),
    ("metrics.jsonl", '{"mixed_groups": 1}\n'), ("config.json", '{"method": "grpo", "seed": 0, "flags": {"lr": 1}}'),
    ("config.json", "{}"), ("config.json", "[]"), ("config.json", "{"), ("config.json", b"\xff"),
    ("evals.jsonl", '{"task": "math"}\n'), ("evals.jsonl", "3\n"), ("summary.json", "{}"), ("summary.json", "[]"),
    ("summary.json", '{"results": {}}'), ("summary.json", '{"results": {"0.1": {}}}')])
def test_a_file_that_is_none_of_ours_is_told_with_its_folder(tmp_path, capsys, name, content):
    folder = make_run(tmp_path / "a", "grpo", 0)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert evaluation.main(["compare", str(folder)]) == 2
    [said] = capsys.readouterr().err.splitlines()
    no_json = f"{folder / name}:1: not valid JSON"
    assert said.startswith("error: " + (no_json if content in ("{", b"\xff") else f"{folder}: its files were not written by"))


def results_of(folder: Path, accuracy: float, model="x", n=1, temperature="0.0", seed=0, **settings) -> Path:
    folder.mkdir(parents=True)
    task = dict(accuracy=accuracy, stderr=0.1, problems=100, n=n)
    (folder / "summary.json").write_text(json.dumps(dict(model=model, seed=seed, settings=settings, results={
        temperature: dict(tasks={"math": task})})))
    return folder


def test_a_task_measured_twice_in_the_same_way_is_not_dropped_in_silence(tmp_path, capsys):
    run = make_run(tmp_path / "g", "grpo", 0)
    results_of(run / "eval" / "s0", 0.25)
    assert evaluation.main(["compare", str(run)]) == 0
    results_of(run / "eval" / "s1", 0.5, seed=1)
    capsys.readouterr()
    assert evaluation.main(["compare", str(run)]) == 2
    assert "holds math (n = 1, T = 0) twice" in capsys.readouterr().err


def test_scores_measured_with_other_limits_are_marked(tmp_path, capsys):
    a, b = (make_run(tmp_path / name, "grpo", seed) for seed, name in enumerate("ab"))
    results_of(a / "eval", 0.25, max_new_tokens=90, context=4096, top_p=1.0)
    results_of(b / "eval", 0.75, max_new_tokens=20, context=4096, top_p=1.0)
    table = compare.comparison(runs.read_runs([a, b]))
    assert "- math: NOT MEASURED ALIKE: 100 problems, n = 1, T = 0, at most 20 tokens; 100 problems" in table
    for name, alike in (("context", 512), ("top_p", 0.9)):
        c = results_of(tmp_path / name, 0.5, max_new_tokens=90, **{name: alike})
        assert "NOT MEASURED ALIKE" in compare.comparison(runs.read_runs([a, c]))


def test_checkpoints_of_different_runs_are_different_models(tmp_path):
    folders = [results_of(tmp_path / name, 0.5, model=f"runs/{name}/checkpoints/step-100") for name in "AB"]
    assert {r.label for r in runs.read_runs(folders)} == {"A/step-100", "B/step-100"}


def test_runs_are_labelled_by_what_makes_them_another_experiment(tmp_path):
    paths = [make_run(tmp_path / "a", "edge-grpo", 0), make_run(tmp_path / "b", "edge-grpo", 1, eval_n=4, max_rows=3),
             make_run(tmp_path / "c", "edge-grpo", 0, correction="none"), make_run(tmp_path / "d", "grpo", 0, eda=True)]
    assert {r.path.name: r.label for r in runs.read_runs(paths)} == {
        "a": "edge-grpo", "b": "edge-grpo", "c": "edge-grpo correction=none", "d": "grpo eda=True"}
    paths.append(make_run(tmp_path / "e", "edge-grpo", 0, lr=1e-5))
    labels = {r.path.name: r.label for r in runs.read_runs(paths)}
    assert labels["e"] == "edge-grpo lr=1e-05" and labels["a"] == labels["b"] == "edge-grpo lr=0.0001"
    with pytest.raises(UserError, match="neither a run"):
        runs.read_runs([tmp_path])
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="were not written by"):
        runs.read_runs(paths)


# --- packed runs -----------------------------------------------------------------------------------------------------

def test_packed_runs_are_read_as_the_folders_they_were_made_from(tmp_path, capsys):
    metrics = [{**m, "loss": -0.123456789 * m["step"], "advantage_variance_eda": 1234.56789012, "accuracy": a}
               for m, a in zip(METRICS, (None, 0.25))]
    folders = [make_run(tmp_path / "runs" / f"g{seed}", "grpo", seed, (seed / 7,), metrics=metrics, lr=1e-5)
               for seed in (0, 1)]
    folders.append(results_of(tmp_path / "runs" / "only-results", 0.3))
    results_of(folders[0] / "eval" / "avg8", 1 / 3, n=8)
    file = tmp_path / "all.jsonl.xz"
    assert evaluation.main(["pack", *map(str, folders), "--out", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    fresh, packed = runs.read_runs(folders), runs.read_runs([file])
    for a, b in zip(fresh, packed, strict=True):
        assert b.path == file / a.path.name
        assert (a.label, a.flags, a.evals, a.summaries, a.scores) == (b.label, b.flags, b.evals, b.summaries, b.scores)
        assert [line.keys() for line in a.metrics] == [line.keys() for line in b.metrics]
        for x, y in zip(a.metrics, b.metrics):
            assert x == pytest.approx(y, rel=1e-5, abs=1e-6)
    assert "accuracy" not in packed[1].metrics[0] and packed[1].metrics[1]["loss"] == -0.246914
    assert compare.comparison(fresh) == compare.comparison(packed).replace(str(file), str(tmp_path / "runs"))
    again = tmp_path / "again.jsonl.xz"
    assert evaluation.main(["pack", str(file), "--out", str(again)]) == 0
    assert again.read_bytes() == file.read_bytes(), "packing is a function of what is packed"


def test_a_glob_behind_a_packed_file_chooses_runs(tmp_path, capsys):
    file = tmp_path / "all.jsonl.xz"
    folders = [make_run(tmp_path / name, "grpo", 0) for name in ("T0.6-a", "T0.6-b", "c")]
    runs.pack(file, folders)
    assert [r.path.name for r in runs.read_runs([f"{file}/T0.6-*", f"{file}/T0.6-a"])] == ["T0.6-a", "T0.6-b"]
    assert evaluation.main(["compare", f"{file}/d*"]) == 2
    assert f"{file} has no run of that name" in capsys.readouterr().err
    other = make_run(tmp_path / "elsewhere" / "c", "grpo", 0)
    assert evaluation.main(["pack", str(folders[2]), str(other), "--out", str(file)]) == 2
    assert "another run has the name c" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"{}", lambda b: b""])
def test_a_damaged_packed_file_is_told_in_one_sentence(tmp_path, capsys, damage):
    file = tmp_path / "all.jsonl.xz"
    runs.pack(file, [make_run(tmp_path / "a", "grpo", 0)])
    file.write_bytes(damage(file.read_bytes()))
    assert evaluation.main(["compare", str(file)]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert str(file) in said


EVIDENCE = sorted((Path(evaluation.__file__).parent / "results").glob("*.jsonl.xz"))


def test_the_evidence_is_small_and_every_run_of_it_can_be_compared():
    for file in EVIDENCE:
        found = runs.read_runs([file])
        assert len(found) >= 3 and all(r.scores and r.method in METHODS for r in found), file
    tracked = [p for p in EVIDENCE[0].parent.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert len(tracked) <= 60 and sum(p.stat().st_size for p in tracked) <= 3_000_000


def test_the_packed_evidence_gives_the_numbers_of_the_report():
    """Two rows of the table at T = 0.6 in results/README.md."""
    axes = EVIDENCE[0].parent / "axes.jsonl.xz"
    table = compare.comparison(runs.read_runs([axes / "T0.6-grpo-*", axes / "T0.6-edge-*"]))
    accuracy, training = cells(table.split("\n\n")[0]), cells(table.split("\n\n")[-2])
    assert accuracy["grpo"][:1] + accuracy["grpo"][-1:] == ["5 (1, 2, 3, 4, 5)", "78.28 ± 1.02"]
    assert "40.47 ± 2.48" in accuracy["edge-grpo"] and "27.50 ± 13.81" in accuracy["grpo"]
    assert training["edge-grpo"][:4] == ["0.515 ± 0.012", "0.900 ± 0.007", "0.900 ± 0.007", "12.202 ± 4.697"]


# --- figures ---------------------------------------------------------------------------------------------------------

def test_curve_smooths_each_seed_and_takes_the_steps_they_share():
    first, second = [(1, 0.0), (2, 1.0), (3, 2.0)], [(1, 4.0), (2, 6.0), (3, 2.0), (4, 9.0)]
    for seeds in ([first, second], [second, first]):
        assert plot.curve(seeds, window=2) == [(1, 2.0, 0.0, 4.0), (2, 2.75, 0.5, 5.0), (3, 2.75, 1.5, 4.0)]
    assert plot.curve([first], window=1) == [(s, v, v, v) for s, v in first]


METRICS = [dict(step=s, entropy=0.5 + s, entropy_sampled=0.25 * s, advantage_variance=0.5, advantage_variance_eda=0.7,
                mixed_groups=0.5, mixed_groups_corrected=1.0, accuracy=0.1 * s) for s in (1, 2)]


def test_the_figures_data(tmp_path):
    unsampled = [{**m, "accuracy": None, "entropy_sampled": None, "mixed_groups": None} for m in METRICS]
    read = runs.read_runs([make_run(tmp_path / "a", "grpo", 0, metrics=METRICS),
                           make_run(tmp_path / "b", "sft", 0, metrics=unsampled)])
    figures = plot.panels_of_curves(read, window=2)
    assert {name: len(panels) for name, panels in figures.items()} == {"entropy": 2, "advantage": 4, "accuracy": 2}
    title, xlabel, curves = figures["entropy"][0]
    assert "as sampled" in title and "last 2 steps" in xlabel
    assert curves == {"grpo": [(1, 0.25, 0.25, 0.25), (2, 0.375, 0.375, 0.375)]}, "SFT samples nothing"
    assert set(figures["entropy"][1][2]) == {"sft", "grpo"}
    title, xlabel, curves = figures["accuracy"][1]
    assert "math" in title and xlabel == "step", "evaluations are not smoothed"
    assert curves["grpo"] == [(10, 0.99, 0.99, 0.99), (20, 0.5, 0.5, 0.5)]
    assert not any(plot.panels_of_bars(read).values())


def results(seed: int, accuracy: float) -> dict:
    return dict(model="m", seed=seed, n=1, results={"0.1": dict(
        tasks={}, reflection=dict(accuracy=accuracy, accuracy_reflecting=None, mean_fixed=0.1),
        entropy=dict(overall=dict(mean_correct=0.2, mean_wrong=0.4, ratio=2.0, correct_above=0.1, wrong_below=0.2)))})


def test_bars_average_over_seeds(tmp_path):
    for seed, accuracy in ((0, 0.2), (1, 0.4)):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "summary.json").write_text(json.dumps(results(seed, accuracy)))
    figures = plot.panels_of_bars(runs.read_runs([tmp_path / "0", tmp_path / "1"]))
    [(title, _, bars)] = figures["reflection"]
    assert title == "Reflection, T = 0.1"
    assert bars["m"]["overall\naccuracy"] == pytest.approx((0.3, 0.2, 0.4)) and len(bars["m"]) == 2, "None is no bar"
    assert [title for title, _, _ in figures["entropy_correctness"]] == list(plot.ENTROPY_BARS)
    assert figures["entropy_correctness"][2][2] == {"m": {"T = 0.1": (2.0, 2.0, 2.0)}}


def test_a_method_has_one_colour_everywhere():
    labels = [*METHODS, "x", "y", "z", "w"]
    style = plot.styles(labels)
    assert len(set(style.values())) == len(labels)
    assert all(plot.styles([m])[m] == style[m] for m in METHODS)
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert {colour for colour, _ in style.values()} == okabe_ito


def test_plot_writes_one_png_per_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is only needed to draw")
    for seed in (0, 1):
        run = make_run(tmp_path / f"run{seed}", "grpo", seed, metrics=METRICS)
        (run / "eval").mkdir()
        (run / "eval" / "summary.json").write_text(json.dumps(results(seed, 0.2 + seed / 10)))
    out = tmp_path / "figures"
    assert evaluation.main(["plot", str(tmp_path / "run0"), str(tmp_path / "run1"), "--out", str(out)]) == 0
    names = ["accuracy", "advantage", "entropy", "entropy_correctness", "reflection"]
    assert sorted(p.name for p in out.iterdir()) == [f"{name}.png" for name in names]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out.iterdir())
    assert sorted(capsys.readouterr().out.split()) == sorted(str(p) for p in out.iterdir())


def test_plot_without_matplotlib_or_data_says_so(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "a", "grpo", 0, metrics=METRICS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text(json.dumps(dict(model="m", seed=0, results={"1": dict(tasks={})})))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluation.main(["plot", str(run), "--out", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(use=lambda name: None))
    assert evaluation.main(["plot", str(tmp_path / "b"), "--out", str(tmp_path)]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    assert evaluation.main(["compare", str(tmp_path / "b")]) == 2 and "nothing to compare" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    """`eval.py compare ... | head`: the pipe is closed before anything is written."""
    process = subprocess.Popen([sys.executable, "eval.py", "compare", str(EVIDENCE[0])], stdout=subprocess.PIPE,
                               cwd=Path(evaluation.__file__).parent, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
