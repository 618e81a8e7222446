"""What the documents promise: their commands run, and their tables are what the scripts print."""

import importlib.util
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from helpers import write_lines

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(
        f"results_{name}", ROOT / "results" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_the_report_is_what_the_script_prints_from_the_packed_runs():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    tables = script("tables")
    made = tables.tables()
    names = re.findall(r"<!-- table (\w+) -->", text)
    assert sorted(names) == sorted(made)
    assert tables.put_in(text, made) == text


def test_the_real_model_s_tables_are_what_its_script_prints():
    text = (ROOT / "results" / "smollm2" / "README.md").read_text(encoding="utf-8")
    tables = importlib.import_module("results.smollm2.tables")
    made = tables.tables()
    assert sorted(re.findall(r"<!-- table (\w+) -->", text)) == sorted(made)
    assert tables.put_in(text, made) == text


def test_what_eda_sees_follows_from_the_packed_responses():
    samples = script("samples")
    runs = script("tables").load(ROOT / "results" / "tiny.jsonl.xz")
    with lzma.open(samples.FILE, "rt") as file:
        packed_runs = json.load(file)
    assert len(packed_runs) == 8
    for run, packed in packed_runs.items():
        name, seed = run.rsplit("-seed", 1)
        metrics = runs[name][int(seed)]["metrics"]
        pairs = {}
        for (kind, step), (relative, share) in samples.what_eda_sees(packed).items():
            logged = metrics[f"relative_entropy_{kind}"][step - 1]
            pairs.setdefault(("P/mean", kind), []).append((relative, logged))
            logged = metrics[f"advantage_share_{kind}"][step - 1] or 0.0  # None: all A^ are 0
            pairs.setdefault(("share", kind), []).append((share, logged))
        for ours, logged in map(numpy.transpose, pairs.values()):
            # A packed metric has three digits, so one step may be off by 0.5%, but not their mean.
            assert ours == pytest.approx(logged, rel=6e-3, abs=1e-4)
            assert ours.mean() == pytest.approx(logged.mean(), rel=2e-3, abs=1e-4)


def test_a_packed_response_has_the_numbers_of_what_was_trained_on(tmp_path):
    numbers = dict(step=1, question_number=2, entropy=0.123456, advantage=1.0, advantage_eda=-2.0)
    right = numbers | dict(accuracy=1.0, tokens=10)
    reflected = numbers | dict(accuracy=0.0, tokens=10, correction="reflect", tokens_corrected=26)
    write_lines(tmp_path / "samples.jsonl", [right, right | dict(accuracy=0.0), reflected])
    columns = script("samples").pack(tmp_path)
    assert columns["kind"] == ["right", "wrong", "reflect"] and columns["tokens"] == [10, 10, 26]
    assert columns["P"] == [0.1235] * 3 and columns["A_hat"] == [-2.0] * 3


def test_a_table_counts_right_responses_and_pairs_by_seed():
    tables = script("tables")
    runs = {}
    for name, shift in (("a", 0), ("b", 1)):
        for seed in (1, 2, 3):
            right = [1 + shift, 0, 4, seed % 2]
            task = {tables.HARD: {"right": right}}
            summary = {"n": 8, "results": {"0.6": {"tasks": task}}}
            runs.setdefault(name, {})[seed] = {"name": name, "summaries": [summary]}
    assert tables.accuracy(runs["a"][1], tables.HARD, 8) == 100 * 6 / 32
    runs["b"][3]["summaries"][0]["results"]["0.6"]["tasks"][tables.HARD]["right"][1] = 1
    # b - a: 1, 1 and 2 of 32 responses
    assert tables.paired(runs["b"], runs["a"], tables.HARD, 8) == "+4.2 ± 1.0 (4.0)"


@pytest.mark.parametrize(
    "document", ["README.md", "program.md", *(f"docs/{f.name}" for f in (ROOT / "docs").iterdir())]
)
def test_links_lead_to_files(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


def blocks():
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    return re.findall(r"<!-- run -->\n```bash\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_the_tiny_commands_of_docs_paper_run_as_printed(tmp_path):
    for path in ROOT.iterdir():
        if path.name not in ("runs", "evals", "figures", ".git"):
            (tmp_path / path.name).symlink_to(path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    commands = blocks()
    assert len(commands) == 4
    for block in commands:
        subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, check=True)
    figures = {file.name for file in (tmp_path / "figures").rglob("*.png")}
    assert figures >= {"figure2.png", "figure3.png", "entropy_histogram.png", "advantage.png"}
