"""`eval.py show`: one group of a run, or one problem of an evaluation, on the terminal and as a page."""

import html.parser
import json
import re

import pytest

import edge_grpo
import eval as evaluation
from errors import UserError
from report import show

SMALL = (
    "--steps 2 --questions-per-step 2 --group-size 4 --max-new-tokens 16 --correction-tokens 8 "
    "--micro-batch-tokens 512 --temperature 1 --eval-tasks"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert edge_grpo.main([*SMALL, "--out", str(out)]) == 0
    return out


def test_a_group_is_shown_with_all_that_the_method_did_to_it(run):
    rows = show.find_group(run, 2, 2)
    assert len(rows) == 4 and len({r["question"] for r in rows}) == 1
    text = show.as_text(rows, width=60)
    assert rows[0]["question"].split(".")[0] in text and f"gold {rows[0]['answers'][0]}" in text
    assert all(
        len(line) <= 60 for line in text.split("\n") if not line[0:1].isdigit()
    )  # headings are one line
    assert len(re.findall(r"^\d\. (?:right|wrong)", text, re.M)) == 4
    for number, r in enumerate(rows, start=1):
        heading = next(line for line in text.split("\n") if line.startswith(f"{number}. "))
        assert (
            f"A {r['advantage']:+.2f} -> {r['advantage_eda']:+.2f}" in heading
            and f"P {r['entropy']:.3f}" in heading
        )
        assert ("correction" in r) == (r["accuracy"] == 0)
    assert all(
        "".join(part for part, _ in r["segments"]).startswith(r["response"])
        for r in rows
        if r.get("correction") in ("reflect", "answer")
    )


def test_injected_text_is_in_brackets_or_in_colour(run):
    rows = [
        dict(
            source="x:1",
            question="1+1?",
            answers=["2"],
            response="It is 3.",
            accuracy=0.0,
            tokens=4,
            entropy=0.5,
            correction="reflect",
            accuracy_corrected=1.0,
            tokens_corrected=9,
            advantage=1.0,
            advantage_eda=2.0,
            segments=[["It is 3.", False], [" Wait!", True], [" 2.", False]],
        )
    ]
    plain, coloured = show.as_text(rows, 80), show.as_text(rows, 80, colour=True)
    assert "It is 3.[ Wait!] 2." in plain and "It is 3.\x1b[35m Wait!\x1b[0m 2." in coloured


class Spans(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.text, self.titles = [], []

    def handle_starttag(self, tag, attributes):
        self.titles += [value for name, value in attributes if name == "title"]
        assert not [
            value for name, value in attributes if name in ("src", "href")
        ]  # self-contained

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shades_each_token_and_needs_nothing_else(run, tmp_path):
    file = tmp_path / "group.html"
    assert (
        evaluation.main(["show", str(run), "--step", "2", "--question", "1", "--html", str(file)])
        == 0
    )
    rows, page, content = show.find_group(run, 2, 1), Spans(), file.read_text(encoding="utf-8")
    page.feed(content)
    assert len(page.titles) == sum(len(r["token_texts"]) for r in rows)
    first = rows[0]
    assert page.titles[0] == (
        f"entropy {first['token_entropies'][0]:.3f}, log-probability {first['token_logp'][0]:.3f}"
    )
    assert "".join(first["token_texts"]) in "".join(page.text)
    starts = [
        (a, b) for r in rows for a, b in zip([False, *r["token_injected"]], r["token_injected"])
    ]
    assert content.count("class=injected") == starts.count((False, True))


def test_the_command_prints_the_last_step_by_default(run, capsys):
    assert evaluation.main(["show", str(run)]) == 0
    assert capsys.readouterr().out.startswith("step 2, question 1: tiny:5-8:")


def test_an_evaluation_is_shown_problem_by_problem(tmp_path, capsys):
    argv = [
        "--model",
        "tiny",
        "--tasks",
        "tiny:1-3:test",
        "--limit",
        "2",
        "--n",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert evaluation.main([*argv, "--max-new-tokens", "12"]) == 0
    capsys.readouterr()
    assert evaluation.main(["show", str(tmp_path), "--question", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny:1-3:test:2, gold ") and len(re.findall(r"^\d\. ", said, re.M)) == 2


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--step", "9"], "holds no question 1 of step 9; it has 2 steps of 2 questions"),
        (["--question", "5"], "holds no question 5 of step 2"),
    ],
)
def test_what_is_not_there_is_one_sentence(run, capsys, argv, says):
    assert evaluation.main(["show", str(run), *argv]) == 2
    assert says in capsys.readouterr().err


def test_a_run_without_tokens_has_no_page(run, tmp_path):
    rows = [
        {k: v for k, v in r.items() if not k.startswith("token_")}
        for r in show.find_group(run, 1, 1)
    ]
    with pytest.raises(UserError, match="--save-tokens"):
        show.as_page(rows)
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(UserError, match="no samples of this version"):
        show.find_group(tmp_path, 1, 1)
    with pytest.raises(UserError, match="neither a run"):
        show.find_group(tmp_path / "nothing", 1, 1)
