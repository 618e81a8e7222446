"""Numbers that are not finite, rows that are empty or all alike, memory that runs out: each has a defined result."""

import json
import math
import signal

import pytest
import torch

import data
import edge_grpo as eg
import engine
import eval as evaluation
import reward
from engine import run as running
from engine import trainer as training
from engine.checkpoints import checkpoint_folders, verified
from engine.models import load_model
from engine.problems import training_problems
from engine.trainer import Trainer
from errors import UserError

SMALL = (
    "--steps 4 --save-every 1 --questions-per-step 1 --group-size 4 --max-new-tokens 12 --correction-tokens 6 "
    "--micro-batch-tokens 512 --eval-tasks"
).split()


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A file of nine problems with solutions."""
    path = tmp_path_factory.mktemp("data") / "nine.jsonl"
    rows = [
        dict(problem=p.question, answer=p.answers[0], solution=p.solution)
        for p in data.load("tiny:1-2")[:9]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path, problems):
    """run(*flags) -> exit code; run.metrics() -> the lines."""
    out = tmp_path / "run"

    def start(*flags):
        return eg.main([*SMALL, "--data", str(problems), "--out", str(out), *flags])

    start.out = out
    start.metrics = lambda: [
        json.loads(line, parse_constant=not_json)
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    start.checkpoints = lambda: [f.name for f in checkpoint_folders(out / "checkpoints")]
    return start


def not_json(constant):
    raise AssertionError(f"{constant} is not JSON")


def weights(folder):
    return load_model(str(folder), torch.device("cpu"), torch.float32).state_dict()


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def from_step(monkeypatch, first, last=10**9, value=float("nan"), what="loss"):
    """In steps first..last the loss (or only its gradient) is not finite."""
    now, batch_of_problems, policy_loss, forward_backward = (
        [0],
        eg.batch_of_problems,
        eg.policy_loss,
        Trainer.forward_backward,
    )

    def counted(problems, flags, step, *again):
        now[0] = step + 1
        return batch_of_problems(problems, flags, step, *again)

    def bad_loss(*arguments):
        return policy_loss(*arguments) * (value if first <= now[0] <= last else 1.0)

    def bad_gradient(trainer, *arguments):
        result = forward_backward(trainer, *arguments)
        if first <= now[0] <= last:
            next(iter(trainer.params.values())).grad.view(-1)[3] = value
        return result

    monkeypatch.setattr(eg, "batch_of_problems", counted)
    if what == "loss":
        monkeypatch.setattr(eg, "policy_loss", bad_loss)
    else:
        monkeypatch.setattr(Trainer, "forward_backward", bad_gradient)


def after_each_update(monkeypatch, look):
    """look(trainer, update's numbers) after every step's update."""
    update = eg.update

    def looked_at(trainer, *rest, **more):
        stats = update(trainer, *rest, **more)
        look(trainer, stats)
        return stats

    monkeypatch.setattr(eg, "update", looked_at)


# --- not finite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted_and_printed(
    run, monkeypatch, capsys, what, value
):
    from_step(monkeypatch, 2, 2, value, what)
    after = []
    after_each_update(
        monkeypatch,
        lambda trainer, _: after.append({k: v.detach().clone() for k, v in trainer.params.items()}),
    )
    assert run("--keep", "9") == 0
    lines = run.metrics()
    assert [m["skipped_updates"] for m in lines] == [0, 1, 0, 0]
    assert lines[1]["grad_norm"] is None and all(
        m["grad_norm"] > 0 for m in lines if m["step"] != 2
    )
    assert (lines[1]["loss"] is None) == (what == "loss")
    printed = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert [line[:7] for line in printed] == ["step 2:", "warning"]  # then, and at the end
    assert run.checkpoints() == [
        "step-4",
        "step-3",
        "step-1",
    ]  # the bad step is no place to go back to
    assert same(after[0], after[1]) and not same(after[1], after[2])
    assert all(v.isfinite().all() for v in after[-1].values())


def test_after_max_bad_steps_the_run_stops_and_names_the_last_good_checkpoint(
    run, monkeypatch, capsys
):
    from_step(monkeypatch, 3)
    assert run("--max-bad-steps", "2", "--keep", "1") == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "in 2 steps in a row" in said
        and str(run.out / "checkpoints" / "step-2") in said
    )
    assert run.checkpoints() == ["step-2"] and verified(run.out / "checkpoints" / "step-2")
    assert [m["skipped_updates"] for m in run.metrics()] == [0, 0, 1, 1]
    assert not (run.out / "final").exists()


def test_bad_steps_count_only_in_a_row(run, monkeypatch):
    from_step(monkeypatch, 2, 3)
    assert run("--max-bad-steps", "3") == 0
    assert [m["skipped_updates"] for m in run.metrics()] == [0, 1, 1, 0]


def test_without_a_checkpoint_the_message_says_so(run, monkeypatch, capsys):
    from_step(monkeypatch, 1)
    assert run("--max-bad-steps", "1") == 2
    assert "none was saved yet" in capsys.readouterr().err


def test_a_signal_among_bad_steps_saves_the_run_and_keeps_the_last_good_checkpoint(
    run, monkeypatch, capsys
):
    from_step(monkeypatch, 2)

    class Asked:
        signal = 0

    with monkeypatch.context() as patch:
        patch.setattr(running, "Stop", lambda: Asked)
        after_each_update(
            patch,
            lambda _, stats: setattr(
                Asked, "signal", signal.SIGTERM if stats["skipped_updates"] else 0
            ),
        )
        assert run("--max-bad-steps", "2", "--keep", "1") == 143
    assert run.checkpoints() == ["step-2", "step-1"]
    assert run("--max-bad-steps", "2", "--keep", "1", "--resume") == 2  # the count goes on
    assert str(run.out / "checkpoints" / "step-1") in capsys.readouterr().err
    assert len(run.metrics()) == 3 and "step-1" in run.checkpoints()


def test_each_of_several_updates_is_judged_by_itself(run, monkeypatch):
    calls = []
    norm = Trainer.gradient_norm
    monkeypatch.setattr(
        Trainer,
        "gradient_norm",
        lambda t: float("nan") if calls.append(0) or len(calls) == 2 else norm(t),
    )
    assert run("--updates-per-rollout", "3", "--steps", "1") == 0
    assert run.metrics()[0]["skipped_updates"] == 1


def test_weights_that_explode_stop_the_run_in_one_sentence(run, capsys):
    assert run("--lr", "1e30") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "logits are not finite" in said and "lower --lr" in said
    assert "none was saved yet" in said and not run.checkpoints()  # a policy that cannot be sampled


# --- rows at the edge ------------------------------------------------------------------------------------------------


def finite(lines):
    return all(v is None or math.isfinite(v) for m in lines for v in m.values())


def nothing_sampled(monkeypatch):
    monkeypatch.setattr(eg, "extend", lambda *_: None)


@pytest.mark.parametrize("loss", ["sequence", "token", "constant"])
def test_empty_responses_teach_nothing(run, monkeypatch, loss):
    nothing_sampled(monkeypatch)
    assert run("--method", "grpo", "--loss", loss, "--steps", "2") == 0
    lines = run.metrics()
    assert finite(lines)
    assert all(
        m["response_tokens"] == m["loss"] == m["grad_norm"] == m["entropy"] == m["accuracy"] == 0
        for m in lines
    )
    assert all(m["truncated"] == 1 and m["logprob_gap"] is None for m in lines)
    assert same(weights("tiny"), weights(run.out / "final"))


def test_empty_responses_can_be_corrected(run, monkeypatch):
    nothing_sampled(monkeypatch)
    assert run() == 0
    lines = run.metrics()
    assert finite(lines) and all(m["response_tokens"] == 0 for m in lines)
    assert (
        sum(m["answered"] + m["referenced"] for m in lines) > 0
        and max(m["grad_norm"] for m in lines) > 0
    )


def test_a_correction_of_no_tokens_is_the_phrase_alone(run):
    assert run("--correction-tokens", "0", "--method", "force-r") == 0
    assert finite(run.metrics()) and all(m["reflected"] > 0 for m in run.metrics())


@pytest.mark.parametrize("method", ["edge-grpo", "grpo", "force-r-eda"])
def test_one_token_responses_and_groups_that_are_all_cut_off(run, method):
    assert run("--max-new-tokens", "1", "--method", method) == 0
    lines = run.metrics()
    assert finite(lines)
    assert all(
        m["response_tokens"] == 1 and m["truncated"] == 1 and m["accuracy"] == 0 for m in lines
    )
    if method == "grpo":  # all wrong: nothing to learn
        assert all(m["loss"] == m["grad_norm"] == m["mixed_groups"] == 0 for m in lines)


def test_a_policy_without_entropy_gives_finite_advantages(run, monkeypatch):
    """Logits so sharp that every response repeats the same tokens with entropy 0 (EDA divides by it)."""
    load = engine.load_policy

    def sharp(*arguments, **more):
        policy = load(*arguments, **more)
        policy.model.model.norm.weight.data.mul_(1e4)
        return policy

    monkeypatch.setattr(engine, "load_policy", sharp)
    assert run("--steps", "2", "--lr", "0") == 0
    lines = run.metrics()
    assert finite(lines) and all(
        m["skipped_updates"] == 0 and m["entropy_sampled"] < 1e-3 for m in lines
    )


def test_a_response_of_one_repeated_token_among_others():
    P = torch.tensor([[0.0, 0.8, 0.4], [0.0, 0.0, 0.0], [1e-45, 1e-45, 1e-45]], dtype=torch.float64)
    A = torch.tensor([[1.0, -0.5, -0.5]] * 3, dtype=torch.float64)
    A_hat = eg.entropy_driven_advantages(A, P)
    assert A_hat.isfinite().all() and A_hat[0, 0] == A[0, 0] / eg.TINY_FLOOR
    assert torch.equal(A_hat[1], A[1])
    assert eg.entropy_driven_advantages(A, P, (0.5, 2.0))[0].tolist() == pytest.approx(
        [2.0, -0.25, -0.5]
    )


@pytest.mark.parametrize("method", ["edge-grpo", "grpo"])
def test_a_group_of_one_has_no_advantage(run, method, capsys):
    """So it is refused, but where wrong responses get one of their own: then only they teach."""
    assert run("--group-size", "1", "--method", method) == 2
    assert capsys.readouterr().err.startswith("error: --group-size 1") and not run.out.exists()
    assert (
        run("--group-size", "1", "--method", method, "--no-eda", "--all-wrong-advantage", "-0.5")
        == 0
    )
    lines = run.metrics()
    assert finite(lines)
    assert all(m["mixed_groups"] == m["advantage_variance"] == 0 for m in lines)
    for m in lines:
        wrong = m["accuracy_corrected"] == 0
        assert m["loss"] == pytest.approx(0.5 * wrong) and (m["grad_norm"] > 0) == wrong


def test_problems_with_a_long_prompt_are_left_out_and_counted(run, problems, tmp_path, capsys):
    longer = tmp_path / "ten.jsonl"
    row = dict(problem="How many? " * 100, answer="1", solution="\\boxed{1}")
    longer.write_text(json.dumps(row) + "\n" + problems.read_text())
    assert run("--max-prompt-tokens", "90", "--data", str(longer), "--steps", "1") == 0
    config = json.loads((run.out / "config.json").read_text())
    assert config["problems"] == 9 and config["problems_left_out"] == [f"{longer}:1"]
    assert "9 problems, 1 left out" in capsys.readouterr().out


def test_a_prompt_must_leave_room_for_a_response(problems):
    policy = engine.load_policy("tiny", "cpu")
    flags = eg.parse_flags(["--model", "tiny", "--data", str(problems)])
    lengths = [len(policy.prompt_ids(p.question)) for p in data.load(str(problems))]
    policy.model.config.max_position_embeddings = max(lengths)
    kept, left_out, _ = training_problems(flags, policy, needs_solution=False)
    assert (
        len(kept) == sum(n < max(lengths) for n in lengths) > 0
        and len(left_out) == len(lengths) - len(kept) > 0
    )
    policy.model.config.max_position_embeddings = min(lengths)
    with pytest.raises(UserError, match="no room for a response in the model's context"):
        training_problems(flags, policy, needs_solution=False)


def test_a_data_set_shorter_than_a_step_is_repeated_evenly(run, problems):
    nine, flags = data.load(str(problems)), eg.parse_flags(["--questions-per-step", "24"])
    for step in range(3):
        batch = [p.source for p in eg.batch_of_problems(nine, flags, step)]
        assert len(batch) == 24
    everything = [
        p.source for step in range(3) for p in eg.batch_of_problems(nine, flags, step)
    ]  # 72 = 8 epochs
    assert all(
        sorted(everything[k : k + 9]) == sorted(p.source for p in nine) for k in range(0, 72, 9)
    )
    assert everything[:9] != everything[9:18]
    one = problems.parent / "one.jsonl"
    one.write_text(problems.read_text().splitlines()[0])
    assert (
        run("--data", str(one), "--questions-per-step", "3", "--group-size", "2", "--steps", "2")
        == 0
    )
    assert finite(run.metrics())


@pytest.mark.parametrize("accuracy", [0.0, 1.0], ids=["all wrong", "no wrong"])
def test_groups_whose_rows_are_all_alike_teach_nothing(run, monkeypatch, accuracy):
    monkeypatch.setattr(reward, "score_all", lambda texts, *_: [(1.0, accuracy)] * len(texts))
    assert run() == 0
    lines = run.metrics()
    assert finite(lines)
    assert all(m["accuracy"] == m["accuracy_corrected"] == m["reward"] == accuracy for m in lines)
    assert all(
        m["mixed_groups"] == m["mixed_groups_corrected"] == m["loss"] == m["grad_norm"] == 0
        for m in lines
    )
    assert all(
        (m["reflected"] + m["answered"] + m["referenced"] == 0) == (accuracy == 1) for m in lines
    )
    assert same(weights("tiny"), weights(run.out / "final"))


# --- memory ----------------------------------------------------------------------------------------------------------


def out_of_memory(*_, **__):
    raise torch.cuda.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of 79 GiB"
    )


def no_times(lines):
    return [
        {k: v for k, v in m.items() if not k.startswith(("seconds", "tokens_per", "peak"))}
        for m in lines
    ]


@pytest.fixture
def expected(run):
    assert run("--steps", "2") == 0
    return run.metrics()


def test_no_cache_of_an_evaluation_stands_in_the_way_of_the_update(tmp_path):
    flags, policy = eg.parse_flags(["--out", str(tmp_path)]), engine.load_policy("tiny", "cpu")
    policy.sampler.fixed = True  # as on a GPU, where the cache outlives the call
    evaluation.while_training(policy, {"easy": data.load("tiny:1-3:validation")[:2]}, flags, 0)
    assert (
        policy.sampler.slots is None
        and json.loads((tmp_path / "evals.jsonl").read_text())["problems"] == 2
    )


def test_out_of_memory_while_sampling_halves_the_rows_once(run, expected, monkeypatch, capsys):
    load, tried = engine.load_policy, []

    def scarce(*arguments, **more):
        policy = load(*arguments, **more)
        sample = policy.sampler.sample

        def limited(prompts, *rest):
            tried.append(min(policy.sampler.max_rows or len(prompts), len(prompts)))
            return out_of_memory() if tried[-1] > 2 else sample(prompts, *rest)

        policy.sampler.sample = limited
        return policy

    monkeypatch.setattr(engine, "load_policy", scarce)
    assert run("--steps", "2", "--overwrite") == 0
    assert (
        capsys.readouterr().err == "out of GPU memory while sampling: going on with --max-rows 2\n"
    )
    assert tried[:2] == [4, 2] and max(tried[1:]) == 2
    assert [m["reflected"] for m in run.metrics()] == [m["reflected"] for m in expected]
    assert run.metrics()[0]["loss"] == pytest.approx(expected[0]["loss"], abs=1e-5)


def test_out_of_memory_in_the_update_halves_the_micro_batch_once_and_counts_no_gradient_twice(
    run, expected, monkeypatch, capsys
):
    backward, budgets = torch.Tensor.backward, []

    def scarce(loss):
        backward(loss)  # the gradients are there when the memory runs out
        [trainer] = trainers
        budgets.append(trainer.micro_batch_tokens)
        if budgets[-1] > 256:
            out_of_memory()

    trainers, make = [], Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda t, *args, **more: trainers.append(t) or make(t, *args, **more)
    )
    monkeypatch.setattr(torch.Tensor, "backward", scarce)
    assert run("--steps", "2", "--overwrite") == 0
    assert (
        capsys.readouterr().err
        == "out of GPU memory in the update: going on with --micro-batch-tokens 256\n"
    )
    assert budgets == [512, 256, 256]
    for m, e in zip(run.metrics(), expected):
        assert m["grad_norm"] == pytest.approx(e["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "where, flag",
    [
        ("gradients", "--micro-batch-tokens"),
        ("sample", "--max-rows"),
        ("score", "--micro-batch-tokens"),
        ("load", "--offload-optimizer"),
    ],
)
def test_out_of_memory_again_stops_with_the_flag_to_set(run, monkeypatch, capsys, where, flag):
    if where == "gradients":
        monkeypatch.setattr(torch.Tensor, "backward", out_of_memory)
    elif where == "score":
        monkeypatch.setattr(training, "response_logprobs", out_of_memory)
    elif where == "sample":
        load = engine.load_policy

        def never(*arguments, **more):
            policy = load(*arguments, **more)
            policy.sampler.sample = out_of_memory
            return policy

        monkeypatch.setattr(engine, "load_policy", never)
    else:
        monkeypatch.setattr(eg, "Trainer", out_of_memory)
    assert run() == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and "out of" in said[-1] and flag in said[-1]
    assert len(said) == (1 if where in ("score", "load") else 2)  # what was tried, then the end
