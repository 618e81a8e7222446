"""One process (then nothing is ever gathered), or several under torchrun: all run the same program on the same list of
rows; `spread` lets each work on its share and gives all of them everything."""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from errors import UserError

SMALL_MODEL = 1e7  # parameters; at 4e6 two threads took 17 times as long as one on two busy cores


def start_processes(device: str) -> torch.device:
    """The device of this process ("auto", "cpu", "cuda", "cuda:1"); joins the group if torchrun started it."""
    several, gpus = int(os.environ.get("WORLD_SIZE", 1)) > 1, torch.cuda.device_count()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: must be auto, cpu, cuda or cuda:N")
    if device.startswith("cuda:") and several:
        raise UserError(
            f"--device {device}: puts every process on the same GPU; take --device cuda under torchrun"
        )
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    found = torch.device(
        device if ":" in device else f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    )
    if cuda and not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: this machine has no CUDA GPU that torch {torch.__version__} can use; "
            "take --device cpu, or install a CUDA build of torch"
        )
    if cuda and found.index >= gpus:
        raise UserError(
            f"--device {found}: this machine has {gpus} GPUs; start as many processes (--nproc-per-node)"
        )
    if cuda:
        torch.cuda.set_device(found)
    if (
        several and not dist.is_initialized()
    ):  # two hours: a checkpoint on a slow disk takes its time
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2)
        )
    return found


def choose_threads(parameters: int) -> None:
    """One thread for a small model: threads that wait for each other spin, on a busy machine ten times as long as they
    compute. OMP_NUM_THREADS wins."""
    if parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def leave(code: int) -> NoReturn:
    """End this process; one of several without tearing Python down, where it may abort after all is done, because a
    thread of gloo still holds a tensor (pytorch/pytorch#179291)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def one_error() -> Iterator[None]:
    """Let only the first process that fails tell its error, by torchrun's own store, which is there before the group;
    the others fail after it, often because of it. The group is left only after success: with NCCL leaving waits for
    the others, who may be waiting for us."""
    try:
        yield
    except BaseException:  # Ctrl-C and exits as well; whatever it was goes on
        if (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            and int(os.environ["WORLD_SIZE"]) > 1
        ):
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
    """Every process's `value`, by rank. (A collective: every process must call it.)"""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], object]):
    """`work()` on the one process that prints and writes; every process gets its result. (A collective.)"""
    return gather(work() if is_main() else None)[0]


def spread(items: list, work: Callable[[list], list]) -> list:
    """`work` on this process's share of `items` (every W-th); returns the results of all of them, in order. It takes a
    list, also an empty one, and returns one of the same length."""
    results = [None] * len(items)
    for r, part in enumerate(gather(work(items[rank() :: world_size()]))):
        results[r :: world_size()] = part
    return results


def stream(*key) -> int:
    """63 bits of `key` alone, for random choices that are the same in any order and on any number of processes."""
    return (
        int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
    )


def uniform(*key) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return (stream(*key) >> 10) * 2.0**-53
