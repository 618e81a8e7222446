"""Problems, downloads and the tiny world: what is loaded is what the files hold, what cannot be loaded is named."""

import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data import Problem, download, gold_text, load, tiny
from errors import UserError

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


# --- Real sets -------------------------------------------------------------------------------------------------------


@upstream
@pytest.mark.parametrize("name", SETS)
def test_real_set_keeps_every_row_byte_for_byte(name, cache):
    problems = load(name, mirror=str(UPSTREAM))
    text = next(UPSTREAM.rglob(Path(download.FILES[name].paths[0]).name)).read_text(
        encoding="utf-8"
    )
    gsm8k = name.startswith("gsm8k")
    rows = [json.loads(line) for line in text.split("\n") if line] if gsm8k else json.loads(text)
    assert len(problems) == len(rows) == SETS[name] == download.FILES[name].rows
    assert [p.question for p in problems] == [row.get("problem") or row["question"] for row in rows]
    assert [p.source for p in problems] == [f"{name}:{i}" for i in range(1, len(rows) + 1)]
    if gsm8k:
        for p, row in zip(problems, rows):
            answer = p.answers[0]
            solution = (
                p.solution.removesuffix(f"\nThe answer is \\boxed{{{answer}}}.")
                + f"\n#### {answer}"
            )
            assert "<<" not in p.solution and solution == re.sub("<<.*?>>", "", row["answer"])
    else:
        answers, solutions = [r["answer"] for r in rows], [r.get("solution") for r in rows]
        assert [p.answers for p in problems] == [
            tuple(a) if isinstance(a, list) else (a,) for a in answers
        ]
        assert [p.solution for p in problems] == [
            s[0] if isinstance(s, list) else s for s in solutions
        ]


@upstream
def test_kinds_of_golds(cache):
    kinds = {
        name: {type(gold) for p in load(name, str(UPSTREAM)) for gold in p.answers} for name in SETS
    }
    assert kinds.pop("amc") == {float} and set(map(frozenset, kinds.values())) == {frozenset({str})}
    assert max(len(p.answers) for p in load("minerva", str(UPSTREAM))) == 3


@upstream
def test_the_easier_part_of_gsm8k_and_its_held_out_tenth(cache):
    """A problem is in one of the two parts whatever the number of lines, and keeps the row number of its file."""
    everything, two = load("gsm8k-train", str(UPSTREAM)), load("gsm8k-train:2", str(UPSTREAM))
    assert (
        len(two) == 1960
        and set(two) <= set(everything)
        and load("gsm8k-train:9", str(UPSTREAM)) == everything
    )
    train, held_out = (
        load(f"gsm8k-train:2:{split}", str(UPSTREAM)) for split in ("train", "validation")
    )
    assert sorted(train + held_out, key=two.index) == two and 150 < len(held_out) < 250
    assert set(held_out) <= set(load("gsm8k-train:9:validation", str(UPSTREAM)))
    for name in ("gsm8k-train:", "gsm8k-train:x", "gsm8k-train:2:test", "gsm8k-train:1"):
        with pytest.raises(UserError, match=name):
            load(name, str(UPSTREAM))


@upstream
def test_references_of_gsm8k_grade_right(cache):
    reward = pytest.importorskip("reward")
    problems = load("gsm8k", str(UPSTREAM)) + load("gsm8k-train", str(UPSTREAM))
    scores = reward.score_all([p.solution for p in problems], [p.answers for p in problems])
    assert [p.source for p, (_, accuracy) in zip(problems, scores) if accuracy != 1.0] == []


def test_test_sets_are_known_by_their_names():
    from data import is_test_set

    assert all(
        map(
            is_test_set,
            ("gsm8k", "math", "aime", "minerva", "tiny:5-8:test", "tiny:1-3:test:terse"),
        )
    )
    assert not any(
        map(
            is_test_set,
            ("gsm8k-train", "gsm8k-train:2", "deepscaler-hard-1k", "tiny:5-8", "mine.jsonl"),
        )
    )


def test_a_large_float_is_injected_as_it_was_written(tmp_path):
    rows = '{"problem": "N?", "answer": 6.02e23}\n{"problem": "x?", "answer": 142.0}\n{"problem": "y?", "answer": 0.5}'
    problems = load(write(tmp_path / "d.jsonl", rows))
    assert [gold_text(p) for p in problems] == ["602" + "0" * 21, "142", "0.5"]


@upstream
def test_manifest_agrees_with_the_table():
    manifest = json.loads((UPSTREAM / "MANIFEST.json").read_text())
    assert manifest["base_url"] == download.BASE
    for entry in manifest["files"]:
        file = download.FILES["deepscaler-hard-1k" if entry["name"] == "train" else entry["name"]]
        assert file.paths == (entry["url_path"], *entry.get("alternative_url_paths", []))
        assert (file.sha256, file.size, file.rows) == (
            entry["sha256"],
            entry["bytes"],
            entry["rows"],
        )


@upstream
def test_injected_gold_grades_itself_right(cache):
    """The text that GEC puts into the box is graded right on every row of every set."""
    reward = pytest.importorskip("reward")
    problems = [p for name in SETS for p in load(name, str(UPSTREAM))]
    responses = [f"\\boxed{{{gold_text(p)}}}" for p in problems]
    scores = reward.score_all(responses, [p.answers for p in problems])
    assert [p.source for p, (_, accuracy) in zip(problems, scores) if accuracy != 1.0] == []


def test_a_gold_may_be_an_integer_beyond_every_float(tmp_path):
    (tmp_path / "x.json").write_text('[{"problem": "10^400?", "answer": 1%s}]' % ("0" * 400))
    [p] = load(str(tmp_path / "x.json"))
    assert p.answers == (10**400,) and gold_text(p) == str(10**400)


@pytest.mark.parametrize(
    "gold, text",
    [
        ("52", "52"),
        (142.0, "142"),
        (0.5, "0.5"),
        (7, "7"),
        ("9.6\n", "9.6"),
        ("$0.10", "$0.10"),
        ("$ $", "$ $"),
        ("$60^{\\circ}$", "60^{\\circ}"),
        ("$$x$$", "x"),
        ("$\\boxed{a=170}$", "a=170"),
        ("\\(\\boxed{77}\\)", "77"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\}}", "\\}"),
        ("$69$,$84$", "$69$,$84$"),
        ("\\boxed{5} or \\boxed{6}", "\\boxed{5} or \\boxed{6}"),
    ],
)
def test_gold_text(gold, text):
    assert gold_text(Problem("q", (gold, "other"), None, "s:1")) == text


# --- Files -----------------------------------------------------------------------------------------------------------


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
    ]
    problems = load(write(tmp_path / "rows.json", json.dumps(rows)))
    found = [(p.solution, p.answers) for p in problems]
    assert found == [
        (" so 1\n2 \n\nThe answer is \\boxed{1,002}.", ("1,002",)),
        (None, ("5",)),
        ("#### 1\nThe answer is \\boxed{2}.", ("2",)),
        ("s", ("is #### 5",)),
    ]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"answer": "1"}, "no field problem"),
        ({"problem": "q", "solution": "s"}, "no field answer"),
        ({}, "no field problem"),
        ({"problem": "q", "answer": None}, "answer is of type NoneType"),
        ({"problem": "q", "answer": " "}, "answer is empty"),
        ({"problem": "", "answer": "1"}, "problem is empty"),
        ({"question": ["q"], "answer": "1"}, "question is of type list"),
        ({"problem": "q", "answer": {"a": 1}}, "answer is of type dict"),
        ({"problem": "q", "answer": True}, "answer is of type bool"),
        ({"problem": "q", "answer": []}, "empty list of answers"),
        ({"problem": "q", "answer": ["1", None]}, "answer is of type NoneType"),
        ({"problem": "q", "answer": float("nan")}, "finite"),
        ({"problem": "q", "answer": "\ud800"}, "surrogate"),
        ({"problem": "q", "answer": "1", "solution": 3}, "solution is of type int"),
        (["q", "1"], "is a JSON list"),
        ("q", "is a JSON str"),
        (None, "NoneType"),
    ],
)
def test_malformed_row_is_named_by_file_and_row(tmp_path, row, says):
    path = write(tmp_path / "rows.json", json.dumps([{"problem": "q", "answer": "1"}, row]))
    with pytest.raises(UserError) as error:
        load(path)
    assert (
        f"{path}:2" in str(error.value)
        and says in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "holds no problem"),
        ("[]", "holds no problem"),
        ("[{]", "not valid JSON"),
        ('{"problem": "q"\n', ":1 is not valid JSON"),
        ('{"problem": "q", "answer": "1"}\nthen', ":2 is not valid JSON"),
        (b'[{"problem": "\xe9"}]', "not UTF-8"),
        ("[" * 100000, "not valid JSON"),
        ('[{"problem": "q", "answer": ' + "1" * 5000 + "}]", "not valid JSON"),
    ],
)
def test_malformed_file_is_one_sentence(tmp_path, content, says):
    path = write(tmp_path / "rows.json", content)
    with pytest.raises(UserError, match=re.escape(path)) as error:
        load(path)
    assert says in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="neither a file nor a known set.*deepscaler-hard-1k"):
        load(str(tmp_path / "no.json"))
    with pytest.raises(UserError, match="is a folder"):
        load(str(tmp_path))


# --- Downloads -------------------------------------------------------------------------------------------------------

CONTENT = json.dumps([{"problem": "1+1?", "answer": "2"}] * 3000).encode()


@pytest.fixture
def small_set(monkeypatch, cache):
    """A set of two addresses, owner `a` before owner `b`, in place of the table of files."""
    paths = ("a/repo/commit/x.json", "b/repo/commit/x.json")
    file = download.PinnedFile(paths, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), 3000)
    monkeypatch.setattr(download, "FILES", {"small": file})
    return cache / "small.json"


@pytest.fixture
def server():
    """A local HTTP server that answers paths from `server.answers`: (status, body, how many bytes of it are sent)."""

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
    threading.Thread(
        target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    yield running
    running.shutdown()
    running.server_close()


def test_download_from_an_address_then_from_the_cache(server, small_set):
    server.answers["/mirror/a/repo/commit/x.json"] = (200, CONTENT, len(CONTENT))
    assert len(load("small", mirror=server.url)) == 3000
    assert small_set.read_bytes() == CONTENT and [p.name for p in small_set.parent.iterdir()] == [
        "small.json"
    ]
    load("small", mirror="/nowhere")
    assert server.asked == ["/mirror/a/repo/commit/x.json"]


def test_alternative_owner_is_tried(server, small_set):
    server.answers["/mirror/b/repo/commit/x.json"] = (200, CONTENT, len(CONTENT))
    assert download.fetch("small", server.url).read_bytes() == CONTENT
    assert server.asked == ["/mirror/a/repo/commit/x.json", "/mirror/b/repo/commit/x.json"]


def test_interrupted_download_leaves_nothing_and_is_finished_by_a_rerun(server, small_set):
    server.answers["/mirror/a/repo/commit/x.json"] = (200, CONTENT, 70000)
    says = r"small: .*/a/repo/commit/x.json: cut off after 70000 of \d+ bytes; .*/b/.* answered 404.*run again"
    with pytest.raises(UserError, match=says):
        download.fetch("small", server.url)
    assert not small_set.parent.exists() or not any(small_set.parent.iterdir())
    server.answers["/mirror/a/repo/commit/x.json"] = (200, CONTENT, len(CONTENT))
    assert download.fetch("small", server.url).read_bytes() == CONTENT


@pytest.mark.parametrize("body", [CONTENT[:-1] + b" ", CONTENT + b" "])
def test_checksum_mismatch_is_refused(server, small_set, body):
    server.answers["/mirror/a/repo/commit/x.json"] = (200, body, len(body))
    with pytest.raises(UserError, match="checksum does not match"):
        download.fetch("small", server.url)
    assert not small_set.exists()


def test_damaged_cache_is_fetched_again(tmp_path, small_set):
    (tmp_path / "a/repo/commit").mkdir(parents=True)
    (tmp_path / "a/repo/commit/x.json").write_bytes(CONTENT)
    small_set.parent.mkdir()
    small_set.write_bytes(CONTENT[:100])
    assert download.fetch("small", str(tmp_path)).read_bytes() == CONTENT


def test_no_network_and_no_mirror_file_name_the_addresses(tmp_path, small_set, monkeypatch):
    with pytest.raises(
        UserError, match=f"{tmp_path}/b/repo/commit/x.json: there is no such file.*--mirror"
    ):
        download.fetch("small", str(tmp_path))
    monkeypatch.setattr(download, "BASE", "http://127.0.0.1:9/")
    with pytest.raises(
        UserError, match="http://127.0.0.1:9/a/repo/commit/x.json: no connection.*run again"
    ):
        download.fetch("small")


def test_failed_write_keeps_the_old_file_and_no_part(tmp_path, small_set, monkeypatch):
    def full_disk(part, target):
        assert Path(part).read_bytes() == CONTENT
        raise OSError(28, "No space left on device")

    (tmp_path / "a/repo/commit").mkdir(parents=True)
    (tmp_path / "a/repo/commit/x.json").write_bytes(CONTENT)
    small_set.parent.mkdir()
    small_set.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match=f"cannot write {small_set}: No space left on device"):
        download.fetch("small", str(tmp_path))
    assert [(p.name, p.read_bytes()) for p in small_set.parent.iterdir()] == [
        ("small.json", b"old")
    ]


def test_unwritable_cache(tmp_path, small_set, monkeypatch):
    (tmp_path / "a/repo/commit").mkdir(parents=True)
    (tmp_path / "a/repo/commit/x.json").write_bytes(CONTENT)
    write(small_set.parent, "a file where the folder should be")
    with pytest.raises(UserError, match=f"{small_set} cannot be read: Not a directory; remove it"):
        download.fetch("small", str(tmp_path))
    monkeypatch.setattr(download, "CACHE", Path("/proc/self/cache"))  # nobody can make this folder
    with pytest.raises(UserError, match="cannot write /proc/self/cache/small.json"):
        download.fetch("small", str(tmp_path))


def test_download_command(tmp_path, small_set, capsys):
    with pytest.raises(SystemExit) as stop:
        download.main(["tiny"])
    assert stop.value.code == 2 and "unknown set 'tiny'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        download.main(["--mirror", str(tmp_path)])
    assert stop.value.code == 2 and "there is no such file" in capsys.readouterr().err
    (tmp_path / "b/repo/commit").mkdir(parents=True)
    (tmp_path / "b/repo/commit/x.json").write_bytes(CONTENT)
    download.main(["--mirror", str(tmp_path)])
    assert "small: 3000 rows" in capsys.readouterr().out


# --- The tiny world --------------------------------------------------------------------------------------------------

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
    tasks = [[(p.question, p.answers) for p in style] for style in (full, terse, half)]
    assert tasks[0] == tasks[1] == tasks[2]
    for p in terse:
        expression, answer = re.fullmatch(r"([-+*()\d]+)=\\boxed\{(\d+)\}\.", p.solution).groups()
        assert eval(expression) == int(answer) == int(p.answers[0]) and "(1)" not in expression
    assert [p.solution for p in half] == [
        pair[i % 2].solution for i, pair in enumerate(zip(full, terse))
    ]
    assert [p.solution for p in load("tiny:5-8")] == [p.solution for p in full]


def chain_of(question: str) -> str:
    """The question without the names, the things and the choice of verbs."""
    bare = re.sub(r"\w+ has (\d+) \w+", r"\1", question)
    return re.sub("|".join(SIGNS), lambda verb: SIGNS[verb[0]], bare)


def test_tiny_splits_are_disjoint_in_their_chains():
    """Not even a held-out chain with other names and things occurs in training, for any pair of STEPS."""
    splits = ("train", "validation", "test")
    train, validation, test = (
        {
            chain_of(p.question)
            for steps in ("1-3", "2", "4-6", "5-8", "1-8")
            for p in load(f"tiny:{steps}:{split}")
        }
        for split in splits
    )
    assert not train & validation and not train & test and not validation & test
    assert [len(load(f"tiny:1:{split}")) for split in splits] == [2048, 256, 256]
    assert len({chain_of(p.question) for p in load("tiny:1-3")}) == 2048
    rng = random.Random(0)
    assert all(tiny.split_of(tiny.warm_start_chain(rng)) == "train" for _ in range(200))


def test_tiny_problems_are_the_same_in_every_process():
    code = "from data import load; print(repr(load('tiny:5-8:test:half')))"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert run.stdout == repr(load("tiny:5-8:test:half")) + "\n"


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "tiny:",
        "tiny:0",
        "tiny:0-3",
        "tiny:9",
        "tiny:3-2",
        "tiny:5-9",
        "tiny:4:dev",
        "tiny:x",
        "tiny:4:test:long",
        "tiny:4:test:full:x",
        "tiny:4:",
        "tiny:4:test:full:",
        "tiny:4\n",
    ],
)
def test_wrong_tiny_name_is_one_sentence(name):
    with pytest.raises(UserError, match="is not a tiny set.*such as tiny:"):
        load(name)


# --- Tokenizer and checkpoint ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(
        ROOT / "data" / "tiny_model", local_files_only=True
    )


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


def test_texts_of_the_world_are_spelled_in_its_words(tokenizer):
    """Digits, words, (k) and the box are single tokens; nothing of this world is spelled in letters."""
    for text in INJECTED + [t for p in load("tiny:1-8:test") for t in (p.question, p.solution)]:
        assert not [
            t
            for t in tokenizer.convert_ids_to_tokens(ids(tokenizer, text))
            if re.fullmatch("[A-Za-z]", t)
        ]
    tokens = tokenizer.convert_ids_to_tokens(ids(tokenizer, "(8)52=\\boxed{7}."))
    assert tokens == ["(8)", "5", "2", "=", "\\boxed{", "7", "}", "."]
    assert len(tokenizer) == 256 + len(tiny.SPECIAL) + len(tiny.WORDS)


def test_chat_template(tokenizer):
    question = load("tiny:4")[0].question
    turns = [
        {"role": "system", "content": "Please reason step by step."},
        {"role": "user", "content": question},
    ]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert prompt == tiny.prompt_text(question)
    assert prompt == tokenizer.apply_chat_template(
        turns[1:], add_generation_prompt=True, tokenize=False
    )
    whole = tokenizer.apply_chat_template(
        turns + [{"role": "assistant", "content": "4"}], tokenize=False
    )
    assert whole == prompt + "4<|im_end|>" and ids(tokenizer, whole)[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_shipped_tokenizer_is_the_recipe_s(tokenizer):
    made = tiny.make_tokenizer()
    assert (
        made.get_vocab() == tokenizer.get_vocab() and made.chat_template == tokenizer.chat_template
    )
    assert (made.eos_token, made.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_shipped_checkpoint(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    folder = ROOT / "data" / "tiny_model"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) and model.config.tie_word_embeddings
    assert set(model.generation_config.eos_token_id) == {
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    }
    p = load("tiny:2:test")[0]
    row = torch.tensor([ids(tokenizer, tiny.prompt_text(p.question) + p.solution + "<|im_end|>")])
    start = len(ids(tokenizer, tiny.prompt_text(p.question)))
    logp = model(row).logits.log_softmax(-1)[0, start - 1 : -1].gather(1, row[0, start:, None])
    assert logp.mean() > -1.0  # it knows its world: far from the -5.7 of chance


def test_training_rows_learn_the_replies_only():
    rng = random.Random(3)
    rows = [tiny.training_row(rng, guesses=True) for _ in range(300)]
    for row in rows:
        learned = "".join(text for text, is_learned in row if is_learned)
        assert (
            learned.endswith("}.<|im_end|>")
            and "How many?" not in learned
            and "Wait!" not in learned
        )
    assert any(tiny.REFLECT in [text for text, _ in row] for row in rows)
