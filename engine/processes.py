"""One process, or several under torchrun. All of them run the same program on the same list of
rows; `spread` gives each its share of the work and everyone all results. With one process nothing
is ever gathered."""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from errors import UserError

SMALL_MODEL = 1e7  # parameters; at 4e6 two threads took 17 times as long as one on two busy cores
JOINING = timedelta(minutes=1)  # torchrun starts all processes at the same time
WAITING = timedelta(hours=2)  # for each other: rank 0 may be writing to a slow disk


def start_processes(device: str) -> torch.device:
    """Join the other processes if torchrun started this one, and return the device that it uses.

    device: "auto", "cpu", "cuda" or "cuda:N". Raises UserError for a device or an environment that
    cannot be used."""
    chosen = choose_device(device)
    if processes_launched() > 1 and not dist.is_initialized():
        join_processes("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def processes_launched() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    size = os.environ.get("WORLD_SIZE", "1")
    complete = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if size != "1" and not (complete and size.isdecimal()):
        raise UserError(
            f"WORLD_SIZE={size} is set in the environment, but this process was not started by "
            "torchrun: start several processes under torchrun, or unset WORLD_SIZE"
        )
    return int(size)


def choose_device(device: str) -> torch.device:
    """The torch.device of --device for this process. Raises UserError where it does not exist."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: must be auto, cpu, cuda or cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if device != "cuda" and processes_launched() > 1:
        raise UserError(
            f"--device {device}: puts every process on the same GPU; use --device cuda under "
            "torchrun"
        )
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    chosen = torch.device(device)
    gpus = torch.cuda.device_count()
    if chosen.index >= gpus:
        raise UserError(
            f"--device {device}: this machine has no CUDA GPU of that number that torch "
            f"{torch.__version__} can use, but {gpus} in all; use --device cpu, another number, "
            "or as many processes as GPUs"
        )
    torch.cuda.set_device(chosen)
    return chosen


def join_processes(backend: str) -> None:
    """Join the group that torchrun's environment variables describe. Raises UserError if the
    others stay away."""
    try:
        store, rank, size = next(rendezvous("env://", timeout=JOINING))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but the other processes did not join "
            f"within {JOINING.seconds} s at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}; start all of them under "
            "torchrun, or unset WORLD_SIZE"
        ) from error
    store.set_timeout(WAITING)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAITING)


def choose_threads(parameters: int) -> None:
    """Use one thread for a small model: on a busy machine, threads spend ten times as long waiting
    for each other as computing. OMP_NUM_THREADS takes precedence."""
    if parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def leave(code: int) -> NoReturn:
    """End this process without Python's own teardown. With torch and transformers that takes a
    second, and one of several processes may abort in it, because a thread of gloo still holds a
    tensor (pytorch/pytorch#179291)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


@contextmanager
def one_error() -> Iterator[None]:
    """Let only the first process that fails report its error: the others fail after it, often
    because of it.

    They count in torchrun's own store, which exists before the group does. The group is left only
    after success: with NCCL, leaving waits for the others, who may be waiting for us."""
    try:
        yield
    except BaseException:  # also Ctrl-C and SystemExit
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if agent and os.environ["WORLD_SIZE"] != "1":
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=10),
            )
            if store.add("processes that failed", 1) > 1:
                raise SystemExit(1) from None
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def gather(value: object) -> list:
    """Every process's `value`, by rank. This is a collective: every process must call it."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], object]):
    """Call work() on the one process that prints and writes; every process gets its result. (A
    collective.)"""
    return gather(work() if is_main() else None)[0]


def spread(*columns_and_work) -> list:
    """spread(column, ..., work): call work(column, ...) with this process's share (every W-th
    entry) of lists of the same length; return the results for all entries, in order.

    `work` takes lists, which may be empty, and returns one of the same length. (A collective.)
    """
    *columns, work = columns_and_work
    results = [None] * len(columns[0])
    parts = gather(work(*[column[rank() :: world_size()] for column in columns]))
    for r, part in enumerate(parts):
        results[r :: world_size()] = part
    return results


def seed_from(*key) -> int:
    """63 bits that depend on `key` alone: random choices are the same in any order and on any
    number of processes."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform_from(*key) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return (seed_from(*key) >> 10) * 2.0**-53
