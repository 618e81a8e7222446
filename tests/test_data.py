"""Problems, downloads and the tiny world. Files that are refused: test_bad_input.py."""

import gzip
import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

import reward
from data import Problem, download, gold_text, is_test_set, load
from data.tiny import split_of
from edge_grpo import ANSWER, parse_flags
from engine.forward import response_logprobs
from engine.modelfiles import TINY_MODEL
from engine.problems import check_golds, training_problems
from errors import UserError
from results import make_tiny_model

ROOT = Path(__file__).parents[1]
UPSTREAM = Path(__file__).parents[2] / "shared" / "upstream"
upstream = pytest.mark.skipif(
    not UPSTREAM.exists(), reason="needs the real data files in ../shared/upstream"
)
SETS = {
    "deepscaler-hard-1k": 1000,
    "aime": 30,
    "amc": 83,
    "math": 500,
    "minerva": 272,
    "olympiad_bench": 675,
    "gsm8k": 1319,
    "gsm8k-train": 7473,
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty download cache of this test's own."""
    monkeypatch.setattr(download, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(path: Path, text) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# --- Real sets -----------------------------------------------------------------------------------


@upstream
@pytest.mark.parametrize("name", SETS)
def test_real_set_keeps_every_row_byte_for_byte(name, cache):
    problems = load(name, mirror=str(UPSTREAM))
    file = next(UPSTREAM.rglob(Path(download.FILES[name].paths[0]).name))
    text = file.read_text(encoding="utf-8")
    if name.startswith("gsm8k"):
        rows = [json.loads(line) for line in text.split("\n") if line]
    else:
        rows = json.loads(text)
    assert len(problems) == len(rows) == SETS[name]
    for number, (p, row) in enumerate(zip(problems, rows), start=1):
        assert p.question == row.get("problem") or p.question == row["question"]
        assert p.source == f"{name}:{number}"
        answer, solution = row["answer"], row.get("solution")
        if name.startswith("gsm8k"):
            [gold] = p.answers
            assert p.solution.endswith(f"\nThe answer is \\boxed{{{gold}}}.")
            steps = p.solution.rpartition("\n")[0]
            assert f"{steps}\n#### {gold}" == re.sub("<<.*?>>", "", answer)
        else:
            assert p.answers == (tuple(answer) if isinstance(answer, list) else (answer,))
            assert p.solution == (solution[0] if isinstance(solution, list) else solution)


@upstream
def test_the_easier_part_of_gsm8k_and_its_held_out_tenth(cache):
    """A problem is in the same part whatever the number of lines, and keeps its row number."""
    everything, two, train, held_out, of_all = (
        load(f"gsm8k-train{part}", str(UPSTREAM))
        for part in ("", ":2", ":2:train", ":2:validation", ":9:validation")
    )
    assert len(two) == 1960 and set(two) <= set(everything)
    assert load("gsm8k-train:9", str(UPSTREAM)) == everything
    assert sorted(train + held_out, key=two.index) == two
    assert 150 < len(held_out) < 250
    assert set(held_out) <= set(of_all)
    with pytest.raises(UserError, match="gsm8k-train:2:test"):
        load("gsm8k-train:2:test", str(UPSTREAM))


@upstream
def test_references_of_gsm8k_grade_right(cache):
    problems = load("gsm8k", str(UPSTREAM)) + load("gsm8k-train", str(UPSTREAM))
    scores = reward.score_all([p.solution for p in problems], [p.answers for p in problems])
    assert [p.source for p, (_, accuracy) in zip(problems, scores) if accuracy != 1.0] == []


def test_test_sets_are_known_by_their_names():
    for name in ("gsm8k", "math", "aime", "minerva", "tiny:5-8:test", "tiny:1-3:test:terse"):
        assert is_test_set(name)
    for name in ("gsm8k-train", "gsm8k-train:2", "deepscaler-hard-1k", "tiny:5-8", "mine.jsonl"):
        assert not is_test_set(name)


@upstream
def test_manifest_agrees_with_the_table():
    manifest = json.loads((UPSTREAM / "MANIFEST.json").read_text())
    assert manifest["base_url"] == download.BASE
    for entry in manifest["files"]:
        file = download.FILES["deepscaler-hard-1k" if entry["name"] == "train" else entry["name"]]
        assert file.paths == (entry["url_path"], *entry.get("alternative_url_paths", []))
        assert file.sha256 == entry["sha256"]


@upstream
def test_golds_of_the_real_sets_grade_themselves_right(cache):
    """One gold of all sets is a sentence that only the same sentence can equal."""
    problems = [p for name in SETS for p in load(name, str(UPSTREAM))]
    assert check_golds(problems) in ([], ["olympiad_bench:74"])
    scores = reward.score_all(list(map(injected, problems)), [p.answers for p in problems])
    assert all(accuracy == 1.0 for _, accuracy in scores)


# --- Golds ---------------------------------------------------------------------------------------


def problem_of(tmp_path: Path, row: dict | str) -> Problem:
    text = row if isinstance(row, str) else json.dumps({"problem": "6*7?"} | row)
    [problem] = load(write(tmp_path / "row.jsonl", text))
    return problem


def injected(problem: Problem) -> str:
    """What GEC injects as the answer."""
    return ANSWER.format(gold_text(problem))


MEAN_42 = r"""
42 | $42$ | $$42$$ | \(42\) | \[ 42 \] | $\boxed{42}$ | \boxed{ 42 } | \(\boxed{42}\) | 42.
So \boxed{41}? No, it is \boxed{42}. | \boxed{\boxed{42}} | <answer>\boxed{42}</answer>
#### 42 | ####42 | ####\t42 | ####\n42 | 6*7=42\n#### 42 | #### $42$ | #### Answer: 42
a #### \boxed{42}
boxed{42} | \fbox{42} | ## 42 | ### Answer\n42
['42'] | ["42"] | [ '42' ] | ('42',) | ['$42$'] | ['**42**'] | array(['42'], dtype=object)
["42", "6*7"]
"42" | '42' | “42” | ‘42’ | «42» | `42` | ```\n42\n``` | "'42'" | "42".
<answer>42</answer> | <answer> 42 </answer>\n | <Answer>42</Answer>
<final_answer>42</final_answer> | <b>42</b>
<think>3 < 4</think>\n<answer>42</answer> | <answer><b>42</b></answer> | <answer>42 | 42</s>
42<|im_end|>
<|begin_of_box|>42<|end_of_box|>
**42** | *42* | __42__ | **42**. | **Answer:** 42 | **Answer: 42** | **Final Answer**\n\n42
**Answer**: $42$
$= 42$ | \(\mathbf{42}\) | = 42 | =42 | => 42 | -> 42 | → 42 | : 42
The answer is 42. | the answer is $42$ | The answer is **42**. | The answer is: 42
My answer is 42
Answer: 42 | answer:42 | ANSWER: 42 | Answer = 42 | Answer - 42 | Ans: 42 | Ans. 42 | Result: 42
Solution: 42
Final answer: 42 | The final answer is 42. | Correct answer: 42 | So the answer is 42.
Therefore, the answer is 42.
The final answer is $\boxed{42}$. I hope it is correct.
Final Answer: The final answer is $42$. I hope it is correct.
"""
MEAN_42 = [g.replace("\\n", "\n").replace("\\t", "\t") for g in re.split(r" \| |\n", MEAN_42) if g]


@pytest.mark.parametrize("solution", [None, "So \\boxed{42}."])
@pytest.mark.parametrize("gold", MEAN_42)
def test_a_gold_is_read_without_its_markup(tmp_path, gold, solution):
    """A right box equals the gold, and what GEC injects, the gold itself, is right and readable."""
    problem = problem_of(tmp_path, {"answer": gold, "solution": solution})
    assert reward.grade("\\boxed{42}", problem.answers)
    assert not reward.grade("\\boxed{43}", problem.answers)
    assert reward.score(injected(problem), problem.answers) == (1.0, 1.0)
    assert problem.solution is None or reward.grade(problem.solution, problem.answers)
    assert check_golds([problem]) == []


AS_THEY_ARE = r"""
-5 | - 5 | x=5 | x = -2 | [1, 2] | [1,2) | (1,2) | <1,2> | a<b>c | 1<x<2 | x<y | "a" or "b" | x'
f''(x) | 5'6" | C#
2**3 | a*b*c | x_1 | $5 | \$5 | $69$,$84$ | \(1\) and \(2\) | \{1,2\} | f(x)=5 | >5 | >=5 | =<5
1:2 | 0.333...
A | (A) | yes | No solution | no answer | the solution set is empty | Solution | Answer: | answer
it's | ** | "" | = | [''] | ####
\begin{pmatrix}1\\2\end{pmatrix} | \langle 1,2\rangle | \boxed{} | \boxed{1} or \boxed{2} | 9.60
 7
"""


@pytest.mark.parametrize("gold", re.split(r" \| |\n", AS_THEY_ARE.strip("\n")))
def test_a_gold_without_markup_stays_byte_for_byte(tmp_path, gold):
    problem = problem_of(tmp_path, {"answer": gold})
    assert problem.answers == (gold,) and problem.solution is None


@pytest.mark.parametrize(
    "text, golds",
    [
        ("['42', '43']", ("42", "43")),
        ("['', ' ', '42']\n", ("42",)),
        ("[' ']", ("[' ']",)),
        ("array(['42' '43'], dtype=object)", ("42", "43")),
        (r'["\\frac{1}{2}"]', (r"\frac{1}{2}",)),
        (r"['\frac{1}{2}']", (r"\frac{1}{2}",)),
        (r"['\begin{array}1\\2\end{array}']", (r"\begin{array}1\\2\end{array}",)),
    ],
)
def test_the_text_of_a_list_is_read_as_the_list(tmp_path, text, golds):
    assert problem_of(tmp_path, {"answer": text}).answers == golds


@pytest.mark.parametrize(
    "gold",
    ["{'answer': '42'}", "[ANS]42[/ANS]", "1. 42", "\boxed{42}"],
)
def test_a_gold_that_cannot_be_read_is_told_in_one_line(tmp_path, capsys, gold):
    problem = problem_of(tmp_path, {"answer": gold})
    right = Problem("6*7?", ("42",), None, "other:1")
    assert check_golds([right, problem]) == [problem.source]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 of 2 golds" in said and problem.source in said


def test_a_training_run_names_golds_that_cannot_be_read(tmp_path, policy, capsys):
    row = {"problem": "6*7?", "answer": "[ANS]42[/ANS]"}
    flags = parse_flags(["--data", write(tmp_path / "row.jsonl", json.dumps(row))])
    problems, left_out, wrong = training_problems(flags, policy, False)
    assert len(problems) == 1 and left_out == wrong == []
    assert "1 of 1 golds cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",  # the answer in JSON => what GEC puts into the box
    [
        "142.0 => 142",
        "6.02e23 => 602000000000000000000000",
        "0.5 => 0.5",
        "7 => 7",
        f"1{'0' * 400} => 1{'0' * 400}",
        '"9.6\\n" => 9.6',
        '"$0.10" => $0.10',
        '"$ $" => $ $',
        '"$60^{\\\\circ}$" => 60^{\\circ}',
        '"$\\\\boxed{a=170}$" => a=170',
        '"\\\\boxed{\\\\}}" => \\}',
        '"\\\\boxed{5} or \\\\boxed{6" => 5',
        '["1", "2"] => 1',
    ],
)
def test_gold_text(tmp_path, row):
    gold, text = row.split(" => ")
    problem = problem_of(tmp_path, f'{{"problem": "q", "answer": {gold}}}')
    assert gold_text(problem) == text


# --- Files ---------------------------------------------------------------------------------------


def test_json_and_jsonl_give_the_same_problems(tmp_path):
    rows = [
        {"problem": "1+1?\u2028", "answer": "2", "solution": "\nso \\boxed{2}"},
        {"question": " x ", "answer": [1, 2.5, "3"], "id": 7},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    as_list = write(tmp_path / "a.json", "\ufeff" + json.dumps(rows))
    as_lines = write(tmp_path / "b.jsonl", lines + "\n")
    for path, second in ((as_list, 2), (as_lines, 3)):  # a JSONL row is found again by its line
        assert load(path) == [
            Problem("1+1?\u2028", ("2",), "\nso \\boxed{2}", f"{path}:1"),
            Problem(" x ", (1, 2.5, "3"), None, f"{path}:{second}"),
        ]


def test_answer_field_in_the_style_of_gsm8k(tmp_path):
    rows = [
        {"question": "q", "answer": " so 1\n2 \n\n#### 1,002 "},
        {"question": "q", "answer": "#### 5"},
        {"question": "q", "answer": "#### 1\n#### 2"},
        {"question": "q", "answer": "is #### 5", "solution": "s"},
        {"question": "q", "answer": "2 <<1+1=2>>2\n####\t**2**"},
    ]
    problems = load(write(tmp_path / "rows.json", json.dumps(rows)))
    found = [(p.solution, p.answers) for p in problems]
    assert found == [
        (" so 1\n2 \n\nThe answer is \\boxed{1,002}.", ("1,002",)),
        (None, ("5",)),
        ("#### 1\nThe answer is \\boxed{2}.", ("2",)),
        ("s", ("5",)),
        ("2 2\nThe answer is \\boxed{2}.", ("2",)),
    ]


CSV = "problem,answer\nWhat is 3*14?,42\n"


@pytest.mark.parametrize(
    "name, content, kind, command",
    [
        ("x.parquet", b"PAR1\x15\x04\xdd\xffPAR1", "Parquet file", "pandas.read_parquet"),
        ("x.arrow", b"ARROW1\x00\x00\xff\xff\xff\xff", "Arrow file", "pandas.read_feather"),
        ("data.arrow", b"\xff\xff\xff\xff\x80\x02", "Arrow file", "Dataset.from_file"),
        ("x.jsonl.gz", gzip.compress(b"{}"), "gzip file", "gunzip"),
        ("x.zip", b"PK\x03\x04\x14\x00", "zip archive", "unzip"),
        ("x.csv", CSV, "CSV file", "pandas.read_csv"),
        ("x.tsv", CSV.replace(",", "\t"), "columns", "pandas.read_table"),
        ("bom.csv", "\ufeff" + CSV.replace("problem", '"the problem"'), "CSV file", "read_csv"),
        ("x.jsonl.xz", b"\xfd7zXZ\x00\x00\xff", "not UTF-8 text", "convert it to JSONL"),
    ],
)
def test_a_file_of_another_format_is_named_with_a_command(tmp_path, name, content, kind, command):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        load(path)
    said = str(error.value)
    assert said.startswith(path) and kind in said and command in said and "\n" not in said


# --- Downloads -----------------------------------------------------------------------------------

CONTENT = json.dumps([{"problem": "1+1?", "answer": "2"}] * 3000).encode()


@pytest.fixture
def small_set(monkeypatch, cache):
    """A set of two addresses, owner `a` before owner `b`, in place of the table of files."""
    paths = ("a/repo/commit/x.json", "b/repo/commit/x.json")
    file = download.PinnedFile(hashlib.sha256(CONTENT).hexdigest(), paths)
    monkeypatch.setattr(download, "FILES", {"small": file})
    return cache / "small.json"


@pytest.fixture
def server():
    """A local HTTP server with `server.answers`: path to (status, body, bytes of it to send)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, sent = self.server.answers.get(self.path, (404, b"", 0))
            self.server.asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:sent])

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.answers, running.asked = {}, []
    running.url = f"http://127.0.0.1:{running.server_port}/mirror"
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


A, B = "/mirror/a/repo/commit/x.json", "/mirror/b/repo/commit/x.json"
WHOLE = (200, CONTENT, len(CONTENT))


@pytest.mark.parametrize("asked", [[A], [A, B]])
def test_a_download_tries_each_owner_and_then_comes_from_the_cache(server, small_set, asked):
    server.answers[asked[-1]] = WHOLE
    assert len(load("small", mirror=server.url)) == 3000
    assert [path.name for path in small_set.parent.iterdir()] == ["small.json"]
    assert small_set.read_bytes() == CONTENT
    load("small", mirror="/nowhere")
    assert server.asked == asked


@pytest.mark.parametrize(
    "answer, says",
    [
        ((200, CONTENT, 70000), "/a/repo/commit/x.json: .*70000 bytes read.*/b/.*: Not Found"),
        ((200, CONTENT + b" ", 10**6), "checksum does not match"),
    ],
)
def test_a_failed_download_leaves_nothing_and_is_finished_by_a_rerun(
    server, small_set, answer, says
):
    server.answers[A] = answer
    with pytest.raises(UserError, match=f"small .*{says}.*run again"):
        download.fetch("small", server.url)
    assert not list(small_set.parent.glob("*"))
    server.answers[A] = WHOLE
    assert download.fetch("small", server.url).read_bytes() == CONTENT


def test_a_damaged_cache_is_fetched_again_and_stays_if_that_fails(server, small_set, monkeypatch):
    server.answers[A] = WHOLE
    small_set.parent.mkdir()
    small_set.write_bytes(CONTENT[:100])

    def full_disk(unfinished, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            download.fetch("small", server.url)
    [file] = small_set.parent.iterdir()
    assert file.read_bytes() == CONTENT[:100]
    assert download.fetch("small", server.url).read_bytes() == CONTENT


def test_loading_problems_does_not_import_torch():
    code = "import sys, data; data.load('tiny:5-8'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- The tiny world ------------------------------------------------------------------------------

SIGNS = {
    "multiplies": "*",
    **dict.fromkeys(("finds", "buys", "wins", "gets"), "+"),
    **dict.fromkeys(("loses", "sells", "gives", "eats"), "-"),
}


def work_out(question: str) -> list[int]:
    """The numbers of a tiny question's chain, read from its text alone."""
    values = [int(re.search(r"has (\d+)", question)[1])]
    for verb, operand in re.findall(r"\(\d\) (\w+)(?: by)? (\d+)\.", question):
        values.append(eval(f"{values[-1]}{SIGNS[verb]}{operand}"))
    return values


@pytest.mark.parametrize("steps, counts", [("1-3", {1, 2, 3}), ("4", {4}), ("5-8", {5, 6, 7, 8})])
def test_tiny_problems_are_right_and_in_their_range(steps, counts):
    problems = load(f"tiny:{steps}:validation")
    assert {len(work_out(p.question)) - 1 for p in problems} == counts
    for p in problems:
        values = work_out(p.question)
        assert p.answers == (str(values[-1]),) and all(0 <= v <= 99 for v in values)
        lines = p.solution.split("\n")
        assert lines[-1] == f"The answer is \\boxed{{{values[-1]}}}." and len(lines) == len(values)
        for k, line in enumerate(lines[:-1]):
            assert line.startswith(f"({k + 1}){values[k]}") and line.endswith(f"={values[k + 1]}")
            assert eval(line.partition(")")[2].replace("=", "=="))


def test_terse_and_half_styles_change_the_solutions_alone():
    full, terse, half = (load(f"tiny:5-8:train:{style}") for style in ("full", "terse", "half"))
    assert [p.solution for p in load("tiny:5-8")] == [p.solution for p in full]
    for i, (p, q, mixed) in enumerate(zip(full, terse, half)):
        assert p.question == q.question == mixed.question
        assert p.answers == q.answers == mixed.answers
        assert mixed.solution == (q if i % 2 else p).solution
        expression, answer = re.fullmatch(r"([-+*()\d]+)=\\boxed\{(\d+)\}\.", q.solution).groups()
        assert eval(expression) == int(answer) == int(p.answers[0])
        assert "(1)" not in expression


def chain_of(question: str) -> str:
    """The question without the names, the things and the choice of verbs."""
    bare = re.sub(r"\w+ has (\d+) \w+", r"\1", question)
    return re.sub("|".join(SIGNS), lambda verb: SIGNS[verb[0]], bare)


def test_tiny_splits_are_disjoint_in_their_chains():
    """No held-out chain occurs in training with other names and things, whatever STEPS."""
    chains = {"train": set(), "validation": set(), "test": set()}
    for split in chains:
        for steps in ("1-3", "2", "4-6", "5-8", "1-8"):
            chains[split] |= {chain_of(p.question) for p in load(f"tiny:{steps}:{split}")}
    train, validation, test = chains.values()
    assert not train & validation and not train & test and not validation & test
    # There are fewer than 2,048 chains of one step for testing.
    assert [len(load(f"tiny:1:{split}")) for split in chains] == [2048, 256, 966]
    assert len({chain_of(p.question) for p in load("tiny:1-3")}) == 2048
    rng = random.Random(0)
    for _ in range(200):
        assert split_of(make_tiny_model.warm_start_chain(rng)) == "train"


def test_tiny_problems_are_the_same_in_every_process():
    code = "from data import load; print(repr(load('tiny:5-8:test:half')))"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert run.stdout == repr(load("tiny:5-8:test:half")) + "\n"


# --- Tokenizer and checkpoint --------------------------------------------------------------------


@pytest.fixture
def tokenizer(policy):
    return policy.tokenizer


INJECTED = [
    " Wait! Something is wrong here.",
    "\nWait! Something is wrong here. After verification, the correct answer is \\boxed{52}.",
]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_round_trip_and_concatenation_of_ids(tokenizer):
    problems = load("tiny:1-8:test:full")[:60] + load("tiny:1-8:test:terse")[:60]
    texts = [text for p in problems for text in (p.question, p.solution)]
    texts += INJECTED + ["(9)=(1) 7", " ", "\n\n", "a  b", "naïve ☃ 漢", "\\boxed{}", "x\ty\r\n"]
    for text, other in zip(texts, texts[1:] + texts[:1]):
        assert tokenizer.decode(ids(tokenizer, text)) == text
        assert tokenizer.decode(ids(tokenizer, text) + ids(tokenizer, other)) == text + other
        assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True) == text


def test_chat_template(tokenizer):
    question = load("tiny:4")[0].question
    turns = [
        {"role": "system", "content": "Please reason step by step."},
        {"role": "user", "content": question},
    ]
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    prompt = render(turns, add_generation_prompt=True)
    assert prompt == make_tiny_model.prompt_text(question)
    assert prompt == render(turns[1:], add_generation_prompt=True)
    whole = render([*turns, {"role": "assistant", "content": "4"}])
    assert whole == prompt + "4<|im_end|>"
    assert ids(tokenizer, whole)[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_shipped_tokenizer_is_the_recipe_s(tokenizer):
    made = make_tiny_model.make_tokenizer()
    assert (
        made.get_vocab() == tokenizer.get_vocab() and made.chat_template == tokenizer.chat_template
    )
    assert (made.eos_token, made.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_shipped_checkpoint(policy):
    assert sum(path.stat().st_size for path in TINY_MODEL.iterdir()) < 1_000_000
    assert type(policy.model).__name__ == "Qwen2ForCausalLM"
    assert policy.model.config.tie_word_embeddings
    assert policy.model.config.vocab_size == len(policy.tokenizer)
    p = load("tiny:2:test")[0]
    response = policy.encode(p.solution) + [policy.end_id]
    rows = [policy.prompt_ids(p.question)], [response]
    [(logp, _)] = response_logprobs(policy.model, *rows, 1.0, policy.vocab_size, 1000)
    assert logp.mean() > -1.0  # it knows its world: far from the -5.7 of chance
