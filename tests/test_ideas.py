"""The README's "To try an idea", tried: each idea is a short run of edge_grpo.py with one function of it written anew,
or one row and one function added, as a reader would edit the file, and nothing else."""

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import data
import edge_grpo

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "edge_grpo.py").read_text(encoding="utf-8")
SMALL = (
    "--steps 3 --save-every 0 --questions-per-step 2 --group-size 4 --max-new-tokens 48 --correction-tokens 12 "
    "--micro-batch-tokens 1024 --temperature 1.3 --eval-tasks"
).split()


def lines_of(name: str) -> tuple[int, int]:
    """Where a function or an assignment stands in edge_grpo.py (decorators aside): its first line and the one after."""
    for node in ast.parse(SOURCE).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if name in [
            getattr(node, "name", None),
            *(t.id for t in targets if isinstance(t, ast.Name)),
        ]:
            return node.lineno - 1, node.end_lineno
    raise AssertionError(f"edge_grpo.py has no {name} of its own")


def written_anew(function: str) -> str:
    """edge_grpo.py with this function in the place of the one of its name."""
    lines = SOURCE.splitlines()
    first, after = lines_of(ast.parse(function).body[0].name)
    return "\n".join([*lines[:first], function, *lines[after:]])


def with_row(row: str, function: str) -> str:
    """edge_grpo.py with one more row at the end of CORRECTIONS, and the function it needs before it."""
    lines = SOURCE.splitlines()
    first, after = lines_of("CORRECTIONS")
    assert lines[after - 1] == "}"
    return "\n".join(
        [*lines[:first], function, "", *lines[first : after - 1], row, *lines[after - 1 :]]
    )


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "nine.jsonl"
    rows = [
        dict(problem=p.question, answer=p.answers[0], solution=p.solution)
        for p in data.load("tiny:2-3")[:9]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path, problems, monkeypatch):
    """run(source of edge_grpo.py, *flags) -> the lines of metrics.jsonl and of samples.jsonl."""

    def start(source, *flags):
        out, module = tmp_path / f"run {len(list(tmp_path.iterdir()))}", ModuleType("edited")
        monkeypatch.setitem(sys.modules, "edited", module)
        exec(compile(source, "edge_grpo.py, edited", "exec"), module.__dict__)
        assert module.main([*SMALL, "--data", problems, "--out", str(out), *flags]) == 0
        return [
            [json.loads(line) for line in (out / name).read_text().splitlines()]
            for name in ("metrics.jsonl", "samples.jsonl")
        ]

    return start


def numbers(metrics: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in m.items() if not k.startswith(("seconds_", "tokens_per", "peak_"))}
        for m in metrics
    ]


def final_reward(sample: dict) -> float:
    return sample.get("accuracy_corrected", sample["accuracy"])


def test_a_new_advantage(run):
    """Leave-one-out: each reward against the mean of the other ones."""
    _, samples = run(
        written_anew("""
def group_advantages(rewards, eps=1e-4, std="group"):
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others
"""),
        "--no-eda",
    )
    taught = 0
    for k in range(0, len(samples), 4):
        r = [final_reward(s) for s in samples[k : k + 4]]
        expected = [x - (sum(r) - x) / 3 for x in r]
        assert [s["advantage"] for s in samples[k : k + 4]] == pytest.approx(expected)
        assert [s["advantage_eda"] for s in samples[k : k + 4]] == pytest.approx(expected)
        taught += max(r) != min(r)
    assert len(samples) == 24 and taught


def test_a_new_use_of_entropy(run):
    metrics, samples = run(
        written_anew("""
def entropy_driven_advantages(advantages, response_entropy, clamp=None):
    return advantages * torch.exp(-response_entropy)
""")
    )
    for s in samples:
        assert s["advantage_eda"] == pytest.approx(
            s["advantage"] * torch.tensor(-s["entropy"]).exp().item(), rel=1e-5
        )
    assert any(s["advantage"] for s in samples) and any(m["grad_norm"] > 0 for m in metrics)


HINT = (
    '    "hint":      Correction(hint, keeps=True, goes_on=True, needs_solution=False, count="hinted"),',
    """
def hint(policy, problem, u):
    return policy.encode(f" The answer has {len(data.gold_text(problem))} digits.")
""",
)


@pytest.mark.parametrize(
    "flags", ["--correction hint", f"--guided-probs {'0 ' * len(edge_grpo.CORRECTIONS)}1"]
)
def test_a_new_correction_is_one_row_and_one_function(run, flags):
    """It can be drawn, is counted, is seen in the samples, and the policy goes on behind it."""
    metrics, samples = run(with_row(*HINT), *flags.split())
    hinted = [s for s in samples if s.get("correction")]
    assert (
        len(hinted)
        == sum(s["accuracy"] == 0 for s in samples)
        == sum(m["hinted"] for m in metrics)
        > 0
    )
    assert {s["correction"] for s in hinted} == {"hint"}
    for s in hinted:
        kept, phrase, continued = s["corrected"].partition(" The answer has ")
        assert kept == s["response"] and re.match(r"\d+ digits\.", continued)
    assert any(not s["corrected"].endswith("digits.") for s in hinted)
    assert all(0 <= m["hint_fixed"] <= m["hinted"] for m in metrics)
    before, _ = run(SOURCE)
    assert (
        metrics[0].keys() - before[0].keys() == {"hinted", "hint_fixed"}
        and before[0].keys() <= metrics[0].keys()
    )
    assert not any(m[c.count] for m in metrics for c in edge_grpo.CORRECTIONS.values())


def test_a_new_correction_among_the_papers(run):
    metrics, samples = run(
        with_row(*HINT),
        "--guided-probs",
        ".3",
        ".2",
        ".2",
        *["0"] * (len(edge_grpo.CORRECTIONS) - 3),
        ".3",
    )
    assert {s.get("correction") for s in samples} > {None, "hint", "reflect"}
    wrong = sum(s["accuracy"] == 0 for s in samples)
    assert (
        sum(m["hinted"] + m["reflected"] + m["answered"] + m["referenced"] for m in metrics)
        == wrong
    )


def test_another_weight_for_injected_tokens(run):
    """Half the weight, as the flag would give it, by another hand; and a weight that depends on the correction."""
    half = written_anew("""
def tokens_of(responses, A_hat, flags):
    tokens = []
    of_rows = token_weights([len(r.ids) for r in responses], flags.loss, flags.max_new_tokens)
    for r, w, a in zip(responses, of_rows, A_hat.flatten().tolist()):
        weights = torch.tensor([w * (0.5 if x else 1.0) for x in r.injected])
        tokens.append(Tokens(weights=weights, advantages=torch.full_like(weights, a),
                             injected=torch.tensor(r.injected, dtype=torch.float32)))
    return tokens
""")
    (ours, _), (by_flag, _), (plain, _) = (
        run(half),
        run(SOURCE, "--injected-weight", "0.5"),
        run(SOURCE),
    )
    assert numbers(ours) == numbers(by_flag) != numbers(plain)
    references, _ = run(
        half.replace("0.5 if x else", "0.5 if x and r.correction == 'reference' else")
    )
    assert numbers(references) != numbers(ours) and numbers(references) != numbers(plain)
    assert all(m["grad_norm"] is not None for m in references)


def test_another_reward(run):
    """Any float: here shorter is better. GEC corrects what is wrong, whatever the reward."""
    metrics, samples = run(
        written_anew("""
def rewards(responses, flags):
    values = [r.accuracy - 0.01 * len(r.text) for r in responses]
    return torch.tensor(values, dtype=torch.float64).view(-1, flags.group_size)
""")
    )
    for step, m in enumerate(metrics):
        rows = samples[8 * step : 8 * step + 8]
        r = torch.tensor(
            [
                [
                    final_reward(s) - 0.01 * len(s.get("corrected", s["response"]))
                    for s in rows[k : k + 4]
                ]
                for k in (0, 4)
            ],
            dtype=torch.float64,
        )
        assert (
            m["reward"] == pytest.approx(r.mean().item()) and m["reward"] < m["accuracy_corrected"]
        )
        A = (r - r.mean(dim=1, keepdim=True)) / (r.std(dim=1, keepdim=True) + 1e-4)
        assert [s["advantage"] for s in rows] == pytest.approx(A.flatten().tolist())
    assert all(bool(s.get("correction")) == (s["accuracy"] == 0) for s in samples)
    assert any(m["mixed_groups_corrected"] == 1 for m in metrics)


def test_the_names_in_the_readmes_lines_are_those_of_functions_and_tables():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paragraph = readme[readme.index("To try an idea") :].split("\n\n")[0]
    names = set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", paragraph)) - {"edge_grpo.py"}
    assert len(names) >= 3
    for name in names:
        head, *rest = name.removeprefix("edge_grpo.").split(".")
        assert hasattr(edge_grpo, head), f"README: {name} is not in edge_grpo.py"
        fields = getattr(getattr(edge_grpo, head), "__dataclass_fields__", {})
        assert all(part in fields or hasattr(getattr(edge_grpo, head), part) for part in rest), name
