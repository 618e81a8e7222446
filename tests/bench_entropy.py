"""
Time and memory of log-probabilities and entropies: plain autograd, TRL's ways if trl is installed,
and entropy.py.

    OMP_NUM_THREADS=1 python tests/bench_entropy.py                # 2048 x 151,936, fp32, CPU
    python tests/bench_entropy.py --device cuda --dtype bfloat16 --hidden 3584

Each measurement is one forward and backward pass in a process of its own; the variants take turns,
and a speed is the median of the ratios within a round. Extra memory is the growth of the process's
highest resident set (ru_maxrss) during the passes, or of the GPU's highest allocation, less the
size of the two gradients, which every variant returns.

entropy.py needs four matrix products of tokens x vocabulary x hidden (logits, logits again, two
gradients) against three in plain autograd, and far fewer passes over memory: 2.1x as fast with 73x
less memory beyond the gradients at hidden size 256 (2048 tokens x 151,936, fp32, one CPU core),
1.2x with 50x less at 896, where the fourth product weighs more; on an H200 (bf16, 8192 tokens,
hidden size 3584) 0.75x as fast with 26x less. Tried and left out: the "fused" form, which makes the
gradient in the forward pass and needs three products. It has to know each token's factor in the
loss beforehand, so it fits only one update per rollout with entropies known by then; and it must go
through the tokens in blocks and add up the weight's gradient in fp32. It took 9.1 s where this took
9.3 (hidden size 256, blocks of 256 tokens), with 5 times the memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from entropy import logprob_entropy  # noqa: E402

MIB = 2**20


def naive(hidden, weight, targets, temperature):
    """What one writes first: all logits, their log_softmax, the entropy from it."""
    logp = (hidden @ weight.T).float().div(temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def trl_logits(hidden, weight, targets, temperature):
    """TRL's functions on whole logits: log-probabilities row by row, entropies 128 rows at a
    time."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logits = (hidden @ weight.T)[None]
    logp, entropy = selective_log_softmax_and_entropy(logits, targets[None], False, temperature)
    return logp[0], entropy[0]


def trl_chunked(hidden, weight, targets, temperature):
    """TRL's own autograd.Function that never holds the logits, as its GRPOTrainer calls it."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(
        hidden,
        weight,
        None,
        targets,
        temperature,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs", "entropy"),
    )[:2]


VARIANTS = {
    "naive": naive,
    "trl, whole logits": trl_logits,
    "trl, chunked": trl_chunked,
    "entropy.py": logprob_entropy,
}


def peak(device: str) -> int:
    """Bytes: the highest that was ever in use."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(variant: str, tokens: int, hidden: int, vocab: int, device: str, dtype: str) -> dict:
    """One variant in this process: seconds (CPU time on a CPU) and extra bytes of a forward and
    backward pass."""
    if variant.startswith("trl"):
        import trl.kernels  # noqa: E401, F401  takes seconds, which are not the variant's
    torch.manual_seed(0)
    make = dict(device=device, dtype=getattr(torch, dtype), requires_grad=True)
    x = torch.randn(tokens, hidden, **make)
    weight = torch.empty(vocab, hidden, **make)
    with torch.no_grad():
        weight.normal_(std=2 / hidden**0.5)
    targets, g = torch.randint(vocab, (tokens,), device=device), torch.randn(tokens, device=device)
    for n in (8, tokens)[
        device != "cuda" :
    ]:  # a GPU's first call loads kernels; a CPU's would hide in the peak
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before, start = peak(device), clock(device)
        logp, entropy = VARIANTS[variant](x[:n], weight, targets[:n], 0.6)
        gradients = torch.autograd.grad((logp * g[:n]).sum(), (x, weight))
        seconds, extra = clock(device) - start, peak(device) - before
    sums = [t.double().abs().sum().item() for t in (logp, entropy, *gradients)]
    return dict(seconds=seconds, extra=extra, sums=sums)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--one", choices=VARIANTS, help="measure one variant here and print it as JSON"
    )
    args = parser.parse_args()
    sizes = args.tokens, args.hidden, args.vocab, args.device, args.dtype
    if args.one:
        print(json.dumps(measure(args.one, *sizes)))
        return
    names = list(VARIANTS)
    try:
        import trl

        print(f"torch {torch.__version__}, trl {trl.__version__}")
    except ImportError:
        names = ["naive", "entropy.py"]
        print(f"torch {torch.__version__}; trl is not installed, so its rows are left out")
    flags = [f"--{k}={getattr(args, k)}" for k in ("tokens", "vocab", "hidden", "device", "dtype")]
    runs = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            out = subprocess.run(
                [sys.executable, __file__, "--one", name, *flags],
                stdout=subprocess.PIPE,
                check=True,
            )
            runs[name].append(json.loads(out.stdout.splitlines()[-1]))
    report(runs, args)


def report(runs: dict, args) -> None:
    size = torch.finfo(getattr(torch, args.dtype)).bits // 8
    gradients = (args.vocab + args.tokens) * args.hidden * size
    print(
        f"{args.tokens} tokens x {args.vocab} vocabulary, hidden {args.hidden}, {args.dtype}, "
        f"{args.device}, {args.rounds} rounds, {torch.get_num_threads()} threads; "
        f"gradients of {gradients / MIB:.0f} MiB"
    )
    print(
        f"{'':20}{'seconds':>9}{'speed':>8}{'extra MiB':>11}{'less':>8}{'largest difference':>20}"
    )
    base = runs["naive"]
    for name, mine in runs.items():
        speed = statistics.median(b["seconds"] / m["seconds"] for b, m in zip(base, mine))
        extra, base_extra = (
            statistics.median(r["extra"] for r in rs) - gradients for rs in (mine, base)
        )
        off = max(abs(a / b - 1) for a, b in zip(mine[0]["sums"], base[0]["sums"]))
        print(
            f"{name:20}{statistics.median(r['seconds'] for r in mine):9.2f}"
            f"{speed:7.2f}x{extra / MIB:11.0f}{base_extra / extra:7.1f}x{off:20.1e}"
        )


if __name__ == "__main__":
    main()
