"""`eval.py show`: one group of a run, or one problem of an evaluation, as text and as a page."""

import html
import json
import re

import pytest
from helpers import refusal

import edge_grpo
import eval as evaluation
from errors import UserError
from report import show
from report.tables import visible

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
    headings = re.findall(r"^\d\. .*", text, re.M)
    for line in text.split("\n"):
        assert len(line) <= 60 or line in headings
    for heading, r in zip(headings, rows, strict=True):
        assert f"A {r['advantage']:+.2f} -> {r['advantage_eda']:+.2f}" in heading
        assert f"P {r['entropy']:.3f}" in heading
        assert ("correction" in r) == (r["accuracy"] == 0)
        if r.get("correction") in ("reflect", "answer"):
            whole = "".join(part for part, _ in r["segments"])
            assert whole.startswith(r["response"])


def reflected(**changed) -> list[dict]:
    """One row as samples.jsonl holds it."""
    row = dict(
        step=1,
        question_number=2,
        source="x:1",
        question="1+1?",
        answers=["2"],
        response="It is 3.",
        accuracy=0.0,
        tokens=4,
        entropy=0.5,
        relative_entropy=0.25,
        correction="reflect",
        accuracy_corrected=1.0,
        tokens_corrected=9,
        advantage=1.0,
        advantage_eda=4.0,
        segments=[["It is 3.", False], [" Wait!", True], [" 2.", False]],
    )
    return [row | changed]


def test_injected_text_is_in_brackets_or_in_colour():
    plain = show.as_text(reflected(), 80)
    coloured = show.as_text(reflected(), 80, colour=True)
    assert "It is 3.[ Wait!] 2." in plain
    assert "It is 3.\x1b[35m Wait!\x1b[0m 2." in coloured


def test_the_relative_entropy_is_the_one_that_eda_divided_by():
    assert "P 0.500, P/mean 0.25, A +1.00 -> +4.00" in show.as_text(reflected(), 80)
    assert "P/mean –" in show.as_text(reflected(relative_entropy=None), 80)
    [older] = reflected()
    del older["relative_entropy"]
    assert "P 0.500, P/mean –" in show.as_text([older], 80)


HOSTILE = {
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",
    "\u202e12\u202c": r"\u202e12\u202c",
    "\u2066\u2069\u200f\u061c": r"\u2066\u2069\u200f\u061c",
    "50%\r100%\b\x9b": r"50%\r100%\x08\x9b",
    "a\u2028b\ufeff\x00": r"a\u2028b\ufeff\x00",
    "\ud83d": r"\ud83d",
}


@pytest.mark.parametrize("text, shown", HOSTILE.items())
def test_what_a_model_wrote_cannot_steer_the_terminal_or_the_page(text, shown):
    everywhere = dict(
        source=text,
        question=text,
        answers=[text],
        response=text,
        segments=[[text, True]],  # so that the response as sampled is shown, too
        token_texts=[text],
        token_injected=[True],
        token_entropies=[0.1],
        token_logp=[-0.1],
    )
    rows = reflected(**everywhere)
    for output in (show.as_text(rows, 200), show.as_page(rows)):
        assert text not in output and output.count(html.escape(shown)) >= 4
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", output)
        output.encode()
    harmless = "ordinary: äñ≤√2 中文 👍\n\ttabs"
    assert visible(harmless) == harmless


def test_the_page_shades_each_token_and_needs_nothing_else(run, tmp_path):
    file = tmp_path / "group.html"
    argv = ["show", str(run), "--step", "2", "--question", "1", "--html", str(file)]
    assert evaluation.main(argv) == 0
    rows, content = show.find_group(run, 2, 1), file.read_text(encoding="utf-8")
    titles = re.findall(r'title="(.*?)"', content)
    assert len(titles) == sum(len(r["token_texts"]) for r in rows)
    entropy, logp = rows[0]["token_entropies"][0], rows[0]["token_logp"][0]
    assert titles[0] == f"entropy {entropy:.3f}, log-probability {logp:.3f}"
    plain = html.unescape(re.sub(r"<[^<>]*>", "", content))
    assert "".join(rows[0]["token_texts"]) in plain
    assert "src=" not in content and "href=" not in content
    begun = 0
    for r in rows:
        for before, injected in zip([False, *r["token_injected"]], r["token_injected"]):
            begun += injected and not before
    assert content.count("class=injected") == begun


def test_the_command_prints_the_last_step_by_default(run, capsys):
    assert evaluation.main(["show", str(run)]) == 0
    assert capsys.readouterr().out.startswith("step 2, question 1: tiny:5-8:")


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--step", "9"], "holds no question 1 of step 9; it has 2 steps of 2 questions"),
        (["--question", "5"], "holds no question 5 of step 2"),
    ],
)
def test_what_is_not_there_is_one_sentence(run, capsys, argv, says):
    assert says in refusal(capsys, evaluation.main, ["show", run, *argv])


def test_a_run_without_tokens_has_no_page(run, tmp_path):
    rows = [
        {k: v for k, v in r.items() if not k.startswith("token_")}
        for r in show.find_group(run, 1, 1)
    ]
    with pytest.raises(UserError, match="--save-tokens"):
        show.as_page(rows)
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(UserError, match="no run with samples of this version"):
        show.find_group(tmp_path, 1, 1)
    with pytest.raises(UserError, match="no run with samples"):
        show.find_group(tmp_path / "nothing", 1, 1)
