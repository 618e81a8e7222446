"""A whole training step: ours by phase, and TRL's GRPOTrainer on the same work if trl is
installed. Not a test.

    OMP_NUM_THREADS=1 python tests/bench_step.py                # CPU, in pairs with TRL
    python tests/bench_step.py --device cuda --shape 7b --rows 8 --tokens 1024    # ours alone

On a CPU the work is 8 prompts x 8 responses of at most 128 new tokens, fp32, no KL, no gradient
checkpointing. The weights are random and the same on both sides, and a fixed share of the
vocabulary ends a response, so that lengths are geometric with a mean of about 40% of the limit.
Rewards say whether a length is odd: nearly every group is mixed, and grading costs nothing.
Ours does more than TRL's: EDA. (--score adds a forward pass over all responses before the
update, what their entropies would cost if the sampler did not tell them.) Packed rows (a prompt
is run once for all its responses, and only attention sees padding) make the update x 1.4 / 1.5
as fast as rows padded and sorted by length, as models outside the Llama family have them
(--padded). Each run is a process of its own (the first step warms up and is not counted), runs
take turns, a ratio is of two neighbours.

On a GPU (or with --rows) it is a step of the paper's run, in the rows of docs/gpus.md, which
says what an H200 took for each: every response has exactly --tokens tokens and is graded wrong,
the paper's corrections are made (a quarter of the rows answered, a quarter referenced, half go
on by 256 tokens), and all is trained on. MFU is the share of the GPU's dense bf16 peak that 6
(update) or 2 (sampling, scoring) floating-point operations per weight and token make up;
recomputed activations do not count as work.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from bench_rollout import SHAPES, build  # noqa: E402

import edge_grpo  # noqa: E402
import engine  # noqa: E402
from data import Problem  # noqa: E402
from engine.trainer import Trainer  # noqa: E402
from rollout import Sampler  # noqa: E402

PROMPTS, GROUP, LIMIT = 8, 8, 128
HAZARD = 1 / 57  # chance of ending at each token: a mean of 51 tokens, 40% of the limit
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "4090": 165,
}  # dense bf16, from data sheets
MIB = 2**20


def words(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the ids: "w7 w3" is [7, 3]. A prompt is the question alone."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="w0",
        pad_token="w1",
        padding_side="left",
        chat_template="{{ messages[-1]['content'] }}",
    )


def questions(vocab: int, count: int, step: int) -> list[str]:
    """The prompts of a step, 16 to 48 tokens each."""
    draw = random.Random(step)
    made = []
    for _ in range(count):
        length = draw.randint(16, 48)
        made.append(" ".join(f"w{draw.randrange(2, vocab)}" for _ in range(length)))
    return made


def end_ids(vocab: int) -> list[int]:
    """w0 and so many other ids that a random model ends with probability HAZARD at each token."""
    return [0, *range(2, 1 + round(vocab * HAZARD))]


def reward_of(ids: list[int]) -> float:
    return float(len(ids) % 2)


def seconds(device: str) -> float:
    """CPU seconds of this process, or wall seconds of a GPU that has finished its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def highest(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


# --- Ours ---------------------------------------------------------------------------------------


def our_step(policy, trainer, problems, flags, step: int, score: bool) -> tuple[dict, dict, list]:
    """One step of edge_grpo.train without files: seconds and tokens by phase, response lengths."""
    device = policy.device.type
    phases: dict[str, float] = {}
    tokens: dict[str, int] = {}
    start = seconds(device)

    def lap(name, count=0):
        nonlocal start
        now = seconds(device)
        phases[name] = phases.get(name, 0) + now - start
        tokens[name] = count
        start = now

    always_wrong = flags.correction != "none"

    def grade():
        if always_wrong:  # grade as a run does, for the time it takes
            edge_grpo.grade(policy, groups)
        for response in responses():
            response.text = policy.decode(response.ids)
            response.format = 0.0
            response.accuracy = 0.0 if always_wrong else reward_of(response.ids)
        lap("grade")

    def responses():
        return [r for group in groups for r in group.responses]

    groups = edge_grpo.sample(policy, problems, flags, step)
    lap("sample", sum(r.sampled_tokens for r in responses()))
    grade()
    if always_wrong:
        edge_grpo.correct_errors(policy, groups, flags, step)
        lap("correct", sum(r.sampled_tokens for r in responses() if r.correction))
        grade()
    length = sum(len(r.ids) for r in responses())
    if score:
        prompts = []
        for group in groups:
            prompts += [group.prompt] * len(group.responses)
        trainer.logprobs(prompts, [r.ids for r in responses()])
        lap("score", length)
    for group in groups:
        group.A = edge_grpo.advantages(group, flags)
    edge_grpo.fill_in_entropies(trainer, groups)
    for group in groups:
        group.P = edge_grpo.group_entropy(group)
        group.A_hat = edge_grpo.eda(group, group.P, flags)
    step_of_trainer = trainer.step

    def timed_step(*args):
        lap("update", length)
        norm = step_of_trainer(*args)
        lap("AdamW")
        return norm

    trainer.step = timed_step
    edge_grpo.update(trainer, groups, flags, lr=flags.lr)
    trainer.step = step_of_trainer
    return phases, tokens, [len(r.ids) for r in responses()]


def ours(args) -> dict:
    vocab, gpu = SHAPES[args.shape]["vocab_size"], args.device != "cpu"
    tokens, groups, rows = (
        (args.tokens, 1, args.rows) if gpu or args.rows else (LIMIT, PROMPTS, GROUP)
    )
    flags = edge_grpo.parse_flags(
        f"--model random --data none --method {'edge-grpo' if args.rows else 'grpo'} --eda "
        f"--max-new-tokens {tokens} "
        f"--temperature 1 --correction-tokens {tokens // 4} "
        f"--questions-per-step {groups} --group-size {rows} "
        f"--micro-batch-tokens {args.micro_batch_tokens} "
        f"--device {args.device} --seed {args.seed} "
        f"--{'' if gpu and not args.no_checkpointing else 'no-'}gradient-checkpointing "
        f"--{'' if args.offload else 'no-'}offload-optimizer".split()
    )
    model = build(args.shape, args.device, torch.bfloat16 if gpu else torch.float32)
    ends = set() if args.rows else set(end_ids(vocab))
    policy = engine.Policy(
        model,
        words(vocab),
        Sampler(model, ends, vocab),
        ends,
        0,
        vocab,
        torch.device(args.device),
        "qwen",
    )
    trainer = Trainer(
        policy,
        flags.micro_batch_tokens,
        temperature=flags.temperature,
        betas=tuple(flags.betas),
        offload=flags.offload_optimizer,
        checkpointing=flags.gradient_checkpointing,
    )
    trainer.forward_pass.packed &= not args.padded
    before, steps, lengths = highest(args.device), [], []
    for step in range(args.steps + 1):
        solution = " ".join(f"w{step + i + 2}" for i in range(200))  # as long as DeepScaleR's
        problems = [Problem(q, ("7",), solution, "bench") for q in questions(vocab, groups, step)]
        phases, counts, T = our_step(policy, trainer, problems, flags, step, args.score)
        steps.append(phases)
        lengths.append(T)
    return dict(
        phases=steps[1:],
        tokens=counts,
        seconds=[sum(p.values()) for p in steps[1:]],
        lengths=lengths[1:],
        extra=highest(args.device) - before,
        peak=highest(args.device),
        weights=sum(p.numel() for p in model.parameters())
        - model.get_input_embeddings().weight.numel(),
    )


# --- TRL's --------------------------------------------------------------------------------------


def trl_trainer(args, lengths: list, times: list):
    """GRPOTrainer on the same model, prompts and rewards; fills in `lengths` and `times`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(-seconds("cpu"))

        def on_step_end(self, *_, **__):
            times[-1] += seconds("cpu")

    def odd_length(completion_ids, **_):
        lengths.append([len(ids) for ids in completion_ids])
        return [reward_of(ids) for ids in completion_ids]

    vocab = SHAPES[args.shape]["vocab_size"]
    model = build(args.shape)
    model.generation_config.eos_token_id = end_ids(vocab)
    rows = PROMPTS * GROUP
    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        max_steps=args.steps + 1,
        num_generations=GROUP,
        max_completion_length=LIMIT,
        beta=0.0,
        temperature=1.0,
        per_device_train_batch_size=args.trl_rows,
        gradient_accumulation_steps=rows // args.trl_rows,
        loss_type="grpo",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
        seed=args.seed,
        logging_steps=1000,
    )
    prompts = []
    for step in range(args.steps + 1):
        prompts += questions(vocab, PROMPTS, step)
    data = Dataset.from_dict({"prompt": prompts})
    return GRPOTrainer(
        model,
        odd_length,
        args=config,
        train_dataset=data,
        processing_class=words(vocab),
        callbacks=[Watch()],
    )


def trl(args) -> dict:
    lengths, times = [], []
    trainer = trl_trainer(args, lengths, times)
    before = highest("cpu")
    trainer.train()
    assert len(times) == len(lengths) == args.steps + 1, "one call for rewards a step"
    return dict(
        seconds=times[1:], lengths=lengths[1:], extra=highest("cpu") - before, peak=highest("cpu")
    )


# --- The report ---------------------------------------------------------------------------------


def mean_length(run: dict) -> float:
    return statistics.mean(n for step in run["lengths"] for n in step)


def step_seconds(run: dict) -> float:
    return statistics.median(run["seconds"])


def report_phases(run: dict, args) -> None:
    """One line a phase: seconds of a step (median), share, tokens/s and, on a known GPU, MFU."""
    step = step_seconds(run)
    name = torch.cuda.get_device_name() if args.device != "cpu" else ""
    peak = next((t for key, t in PEAK_TFLOPS.items() if key in name), None)
    for phase in run["phases"][0]:
        took, tokens = statistics.median(p[phase] for p in run["phases"]), run["tokens"][phase]
        line = f"  {phase:7}{took:9.3f} s{took / step:8.1%}"
        if tokens and took:
            line += f"{tokens / took:12.0f} tokens/s"
            work = 6 if phase == "update" else 2
            if peak:
                mfu = work * run["weights"] * tokens / took / peak / 1e12
                line += f"{mfu:9.1%} MFU"
        print(line)
    print(
        f"  step   {step:9.3f} s for {mean_length(run) * len(run['lengths'][0]):.0f} response "
        f"tokens; peak "
        f"{run['peak'] / MIB:.0f} MiB, {run['extra'] / MIB:.0f} of them added by the steps"
    )


def child(side: str, args) -> dict:
    """One run in a process of its own."""
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(args).items()
        if k not in ("one", "offload", "score", "padded", "pairs", "no_checkpointing")
    ]
    flags += ["--offload"] * args.offload + ["--score"] * args.score + ["--padded"] * args.padded
    flags += ["--no-checkpointing"] * args.no_checkpointing
    command = [sys.executable, __file__, "--one", side, *flags]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def compare(args) -> None:
    """Pairs of runs of one shape, and their ratios."""
    runs = [(child("ours", args), child("trl", args)) for args.seed in range(args.pairs)]
    report_phases(runs[-1][0], args)
    for name, side in (("ours", 0), ("TRL", 1)):
        mine = [pair[side] for pair in runs]
        peak, extra = (
            statistics.median(run[key] for run in mine) / MIB for key in ("peak", "extra")
        )
        print(
            f"  {name:5}{statistics.median(map(step_seconds, mine)):8.3f} CPU s a step; responses "
            f"of {statistics.mean(map(mean_length, mine)):.1f} tokens; peak {peak:.0f} MiB, "
            f"{extra:.0f} by the steps"
        )
    ratios = [step_seconds(b) / step_seconds(a) for a, b in runs]
    per_token = [r * mean_length(a) / mean_length(b) for r, (a, b) in zip(ratios, runs)]
    for name, values in (("a step", ratios), ("a response token", per_token)):
        print(
            f"  TRL / ours, time of {name}: {' '.join(f'{v:.2f}' for v in values)}; "
            f"median {statistics.median(values):.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=SHAPES, help="default: small and 27m")
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        help="one question, this many responses of full length, no TRL",
    )
    parser.add_argument("--tokens", type=int, default=1024, help="their length")
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=0, help="default: 1024 on a CPU, 8192 on a GPU"
    )
    parser.add_argument(
        "--offload", action="store_true", help="master weights and moments in CPU memory"
    )
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="on a GPU: keep all activations"
    )
    parser.add_argument(
        "--score", action="store_true", help="add a scoring pass over all responses, as a phase"
    )
    parser.add_argument(
        "--padded",
        action="store_true",
        help="update on padded rows, as models that cannot be packed",
    )
    parser.add_argument("--steps", type=int, default=3, help="steps counted in a run")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument(
        "--trl-rows", type=int, default=8, help="TRL's per_device_train_batch_size, up to 64"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--one", choices=["ours", "trl"], help="run one side here and print it as JSON"
    )
    args = parser.parse_args()
    args.micro_batch_tokens = args.micro_batch_tokens or (1024 if args.device == "cpu" else 8192)
    if args.device != "cpu":
        args.rows = args.rows or 8
    if args.one:
        print(json.dumps(ours(args) if args.one == "ours" else trl(args)))
        return
    try:
        import trl as installed

        version = f"trl {installed.__version__}"
    except ImportError:
        version = "trl is not installed, so only ours is timed"
    print(f"torch {torch.__version__}, {version}, {torch.get_num_threads()} threads")
    for args.shape in [args.shape] if args.shape else ["small", "27m"]:
        print(f"{args.shape}, {args.device}:")
        if args.rows or "not installed" in version:
            report_phases(ours(args) if args.device != "cpu" else child("ours", args), args)
        else:
            compare(args)


if __name__ == "__main__":
    main()
