"""How fast rollout.Sampler is, against `model.generate()` on the same work. Not a test: nothing
here passes or fails.

    OMP_NUM_THREADS=1 python tests/bench_rollout.py      # CPU: two models, pairs, memory, ablations
    python tests/bench_rollout.py --device cuda --shape 7b --rows 8,64,256

The work is 64 prompts x 8 samples of up to 128 tokens, with lengths fixed in advance (an
exponential cut at 128, mean 40%), so that both draw the same number of tokens from the same number
of rows. generate() gets left padding, its own cache, all samples of a prompt through
num_return_sequences, sampling without filters, and a stopping criterion that ends each row at its
length. Runs alternate in one process; a ratio is always of two neighbours. Weights are random. Then
each trick of rollout.py is replaced by the plain way. Not worth keeping there: fewer rows at a time
so that their cache fits the processor's, keys and values side by side in one tensor.

With --device cuda it prints milliseconds a decode step (the difference of two runs, so without
prefill), and of its recorded graph replayed alone (of rows that have ended, at their last length),
tokens/s, the bytes a step must read as a share of what a copy on the device reaches, and the ratio
to generate() on the work above. Without a CUDA device it says so and runs the same code with a tiny
model on the CPU, graphs off: no number of that means anything.
"""

import argparse
import math
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout  # noqa: E402
from rollout import Sampler  # noqa: E402

SHAPES = {
    "small": dict(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "27m": dict(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    ),
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "1.5b": dict(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "7b": dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
}


def build(shape: str, device="cpu", dtype=torch.float32) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype).eval()


def work(
    shape: str, questions=64, samples=8, limit=128, prompt=(16, 48), share=0.4
) -> tuple[list, list[int]]:
    """Ragged prompts, and a length for each row: exponential, cut at the limit, `share` of the
    limit on average."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(SHAPES[shape]["vocab_size"]) for _ in range(draw.randint(*prompt))]
        for _ in range(questions)
    ]
    waits = [draw.expovariate(1) for _ in range(questions * samples)]
    low, high = 0.0, 100.0 * limit
    for _ in range(60):  # the scale that gives the wanted mean
        scale = (low + high) / 2
        lengths = [min(limit, 1 + int(scale * w)) for w in waits]
        low, high = (scale, high) if statistics.mean(lengths) < share * limit else (low, scale)
    return prompts, lengths


class EndAt(StoppingCriteria):
    def __init__(self, width: int, lengths: list[int], device):
        self.ends = torch.tensor(lengths, device=device) + width

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] >= self.ends


def run_generate(model, prompts, lengths, seed: int) -> int:
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=mask,
            num_return_sequences=len(lengths) // len(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(lengths),
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([EndAt(width, lengths, model.device)]),
        )
    return sum(lengths)


def run_sampler(model, prompts, lengths, seed: int) -> int:
    out = Sampler(model, set()).sample(prompts, len(lengths) // len(prompts), lengths, 1.0, seed)
    count = sum(len(sample.ids) for row in out for sample in row)
    assert count == sum(lengths)
    return count


def cpu_seconds(run, *args) -> float:
    start = time.process_time()
    run(*args)
    return time.process_time() - start


# ---- what each trick brings: the sampler with that trick replaced by the plain way ---------------


def keep_finished(self):
    """Finished rows stay until all are done."""
    self.lengths = self.length[: len(self.rows)].tolist()
    if all(length >= stop for length, stop in zip(self.lengths, self.stop.tolist())):
        drop_finished(self)


def concatenate(self, slots):
    """A new cache every step, one position longer, as torch.cat makes it."""
    self.reserve(slots, self.capacity + 1)


def expand_heads(q, keys, values, mask, scale):
    keys, values = (t.repeat_interleave(q.shape[2] // t.shape[1], 1) for t in (keys, values))
    return attend_masked(q, keys, values, mask, scale)


def attend_by_sdpa(q, keys, values, mask, scale):
    grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=mask, scale=scale
    ).reshape(q.shape)


def draw_multinomial(p, u):
    ids = torch.multinomial(p, 1)
    return ids[:, 0], p.gather(-1, ids)[:, 0].log()


def draw_one_level(p, u):
    cdf = p.double().cumsum(-1)
    ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    return ids[:, 0], p.gather(-1, ids)[:, 0].log()


def one_prefill_a_row(model, slots, ids, source, target):
    prefill_batch(model, slots, ids[source], torch.arange(len(source)), target)


drop_finished, attend_masked, prefill_batch = (
    rollout.Slots.drop_finished,
    rollout.attend_masked,
    rollout.prefill_batch,
)
ABLATIONS = [
    (
        "own layers and slot cache -> model.forward, DynamicCache",
        "rollout.has_llama_layers",
        lambda model: False,
    ),
    ("finished rows dropped -> kept to the end", "rollout.Slots.drop_finished", keep_finished),
    ("static cache -> a longer one every step", "rollout.Slots.make_room", concatenate),
    ("one prefill a prompt -> one a sample", "rollout.prefill_batch", one_prefill_a_row),
    ("grouped heads -> keys and values expanded", "rollout.attend_masked", expand_heads),
    (
        "attention as two products -> scaled_dot_product_attention",
        "rollout.attend_masked",
        attend_by_sdpa,
    ),
    ("cache without gaps -> room for 64 positions more", "rollout.GROWTH", 64),
    ("inverse CDF -> torch.multinomial", "rollout.invert_cdf", draw_multinomial),
    ("CDF over blocks -> over the vocabulary", "rollout.invert_cdf", draw_one_level),
    ("fused RMSNorm -> the model's module", "rollout.rms_norm", lambda norm, x: norm(x)),
]


# ---- measurements --------------------------------------------------------------------------------


def peak_memory(shape: str, run) -> float:
    """MiB that one run adds to the process's peak, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (shape, run.__name__))


def _peak(shape: str, name: str) -> float:
    torch.set_num_threads(1)
    model, (prompts, lengths) = build(shape), work(shape)
    run_of = {"run_generate": run_generate, "run_sampler": run_sampler}[name]
    run_of(model, prompts[:1], [2], 0)  # what the libraries take for themselves
    before = _high_water()
    run_of(model, prompts, lengths, 0)
    return _high_water() - before


def _high_water() -> float:
    """MiB, the most that this process has held (ru_maxrss would begin at what the parent held)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def bench_cpu(shape: str, rounds: int) -> None:
    model, (prompts, lengths) = build(shape), work(shape)
    tokens, millions = sum(lengths), sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"\n{shape}: Qwen2, {millions:.1f}M parameters, {len(prompts)} prompts x "
        f"{len(lengths) // len(prompts)}, {tokens} tokens, mean {tokens / len(lengths):.1f}, "
        f"max {max(lengths)}; {torch.get_num_threads()} thread(s)"
    )
    cpu_seconds(run_sampler, model, prompts[:2], lengths[:16], 0)
    pairs = [
        (
            cpu_seconds(run_generate, model, prompts, lengths, i),
            cpu_seconds(run_sampler, model, prompts, lengths, i),
        )
        for i in range(rounds)
    ]
    theirs, ours = (statistics.median(column) for column in zip(*pairs))
    ratios = sorted(a / b for a, b in pairs)
    print(f"{'':58}tokens/CPU s   peak MiB")
    print(f"{'generate()':58}{tokens / theirs:12.0f} {peak_memory(shape, run_generate):10.0f}")
    print(f"{'rollout.Sampler':58}{tokens / ours:12.0f} {peak_memory(shape, run_sampler):10.0f}")
    print(
        f"ratio: median {statistics.median(ratios):.2f}, "
        f"{rounds} pairs from {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )
    for name, target, plain in ABLATIONS:
        factors = []
        for i in range(rounds):
            base = cpu_seconds(run_sampler, model, prompts, lengths, i)
            with mock.patch(target, plain):
                factors.append(cpu_seconds(run_sampler, model, prompts, lengths, i) / base)
        print(
            f"  {name:58} x{statistics.median(factors):.2f}  "
            f"({min(factors):.2f} to {max(factors):.2f})"
        )


def seconds(run) -> float:
    start = time.perf_counter()
    run()  # ends with a copy to the host
    return time.perf_counter() - start


def copy_bandwidth(device) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(2**30 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(10):
        times.append(seconds(lambda: (target.copy_(source), target[:1].tolist())))
    return 2 * source.numel() / min(times)


def bytes_a_step(model, rows: int, context: int) -> int:
    """All weights but the input embedding, and the keys and values of every row."""
    config, size = model.config, model.dtype.itemsize
    head = config.hidden_size // config.num_attention_heads
    weights = (
        sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    )
    return size * (
        weights + 2 * config.num_hidden_layers * config.num_key_value_heads * head * rows * context
    )


def bench_device(shape: str, rows_list: list[int], device: str, drafts: int) -> None:
    prompt, short, long = (500, 32, 232) if device == "cuda" else (20, 4, 12)
    model = build(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    bandwidth = copy_bandwidth(device)
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else "CPU, graphs off, a smoke test: not a measurement"
    )
    print(
        f"{shape} on {where}; copy {bandwidth / 1e12:.2f} TB/s; "
        f"context {prompt + short} to {prompt + long}"
    )
    print(
        "rows  ms/step  replay  tokens/s  share of copy bandwidth  "
        "useful tokens/s  generate()  ratio  peak GiB"
    )
    for rows in rows_list:
        sampler = Sampler(model, set(), drafts=drafts)
        sampler.fixed = True
        prompts = [[i % 100] + [1] * (prompt - 1) for i in range(rows)]

        def draw(tokens):
            return seconds(lambda: sampler.sample(prompts, 1, tokens, 1.0, 0))

        draw(long)  # graphs
        [graphs] = sampler.graphs.values()
        with torch.inference_mode():
            replay = (
                min(
                    seconds(lambda: ([graphs[rows]() for _ in range(50)], sampler.knobs.tolist()))
                    for _ in range(3)
                )
                / 50
            )
        step = (min(draw(long) for _ in range(3)) - min(draw(short) for _ in range(3))) / (
            long - short
        )
        share = bytes_a_step(model, rows, prompt + (short + long) // 2) / step / bandwidth
        ragged, lengths = work(shape, max(1, rows // 8), min(rows, 8), long, (prompt // 2, prompt))
        sampler.sample(ragged, min(rows, 8), lengths, 1.0, 0)
        ours = sum(lengths) / seconds(lambda: sampler.sample(ragged, min(rows, 8), lengths, 1.0, 1))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else math.nan
        sampler.release()
        run_generate(model, ragged, [2] * len(lengths), 0)
        theirs = sum(lengths) / seconds(lambda: run_generate(model, ragged, lengths, 1))
        print(
            f"{rows:4} {1000 * step:8.2f} {1000 * replay:7.2f} {rows / step:9.0f} {share:24.2f} "
            f"{ours:16.0f} {theirs:11.0f} {ours / theirs:6.2f} {peak:9.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", help="cpu: small,27m (default); cuda: 7b (default), 1.5b")
    parser.add_argument("--rows", help="cuda: rows in the batch", default="8,64,256")
    parser.add_argument("--rounds", type=int, default=5, help="cpu: pairs")
    parser.add_argument(
        "--drafts", type=int, default=0, help="cuda: tokens that a step verifies; see `replay` only"
    )
    flags = parser.parse_args()
    if flags.device == "cpu":
        torch.set_num_threads(1)
        for shape in (flags.shape or "small,27m").split(","):
            bench_cpu(shape, flags.rounds)
    elif torch.cuda.is_available():
        rows = [int(rows) for rows in flags.rows.split(",")]
        bench_device(flags.shape or "7b", rows, "cuda", flags.drafts)
    else:
        print(
            "There is no CUDA device here, so nothing is measured; "
            "the same code with a tiny model, graphs off:"
        )
        bench_device("tiny", [8, 16], "cpu", flags.drafts)


if __name__ == "__main__":
    main()
