"""What a program prints, how it is asked to stop, and how an error becomes one sentence and an
exit code."""

import io
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from engine.processes import is_main, one_error, world_size
from errors import UserError


def say(line: str = "") -> None:
    """Print a line, on the one process that prints."""
    if is_main():
        tqdm.write(line)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough for one sentence."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it brings its own code, which runs only with --trust-remote-code"
    return text.split("\n")[0][:200] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory is left: on the GPU, on the CPU, or to pin for a GPU."""
    if isinstance(error, MemoryError):
        return True
    pattern = "out of memory|can't allocate memory|not enough memory"
    return isinstance(error, RuntimeError) and re.search(pattern, str(error)) is not None


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the group has gone."""
    from_collective = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    return world_size() > 1 and from_collective


def exit_code(work: Callable[[], int], go_on: str, less_memory: str) -> int:
    """Return the exit code of work(); a mistake of the user ends in one sentence on stderr and
    code 2.

    go_on: how to continue once the mistake is corrected. less_memory: which flags to set where
    memory is short.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console without ± does not end a run
            stream.reconfigure(errors="replace")
    try:
        with one_error():
            code = work()
            sys.stdout.flush()
            return code
    except UserError as error:
        sentence = str(error)
    except BrokenPipeError:  # nobody reads the output any more, as behind `| head`
        # Python would complain once more when it flushes stdout at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (OSError, SafetensorError) as error:
        sentence = f"{first_line(error)}; fix that and {go_on}, or give another --out"
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            sentence = f"out of memory ({first_line(error)}): {less_memory}"
        elif is_lost_process(error):
            sentence = f"another process has ended, so this one cannot continue; {go_on}"
        else:
            raise
    except KeyboardInterrupt:  # before the first step: nothing to finish or to save
        print(f"stopped; {go_on}", file=sys.stderr)
        return 130
    print(f"error: {sentence}", file=sys.stderr)
    return 2


class Stop:
    """SIGINT, SIGTERM and SIGHUP let the step finish and save.

    A second SIGINT or SIGTERM ends the process at once. Under torchrun it does not: torchrun
    forwards signals that the processes may have received already, and ends the processes itself."""

    def __init__(self):
        self.signal = 0
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # that would be nohup
            signal.signal(signal.SIGHUP, self.ask)

    def ask(self, number: int, frame) -> None:
        if number == signal.SIGHUP:  # the terminal is closed, so nothing can be printed there
            for terminal in self.terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        if self.signal:
            return
        self.signal = number
        note = "finishing the step, then saving"
        if world_size() == 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            note += "; once more to stop at once"
        if is_main():
            with suppress(OSError):  # os.write, because the signal may have interrupted a print
                os.write(2, f"\n{note}\n".encode())


SECONDS = Counter()  # by phase, since a step began


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """As a decorator: add the seconds that a function takes, the GPU's work included, to those of
    its phase."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    SECONDS[phase] += time.perf_counter() - started


class Progress:
    """A bar on a terminal. Elsewhere a line at the first step, at the last, and at most every ten
    seconds in between. shown: the metrics to show, and their short names."""

    def __init__(self, steps: int, first: int, shown: dict[str, str]):
        self.steps, self.first, self.shown = steps, first, shown
        self.started = time.perf_counter()
        self.printed = -math.inf  # when the last line was
        self.bar = tqdm(
            total=steps,
            initial=first,
            disable=not (is_main() and sys.stderr.isatty()),
            bar_format="{n}/{total} |{bar:10}| {remaining} left{postfix}",
        )

    def show(self, line: dict) -> None:
        parts = [f"{short} {line[k]:.2f}" for k, short in self.shown.items() if line[k] is not None]
        if line["tokens_per_second"]:  # SFT samples nothing
            parts.append(f"{line['tokens_per_second']:.0f} tok/s")
        text = ", ".join(parts)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        now, step = time.perf_counter(), line["step"]
        if self.bar.disable and (now - self.printed >= 10 or step == self.steps):
            self.printed = now
            pace = (now - self.started) / (step - self.first)
            minutes = pace * (self.steps - step) / 60
            say(f"step {step}/{self.steps}: {text}, {minutes:.1f} min left")
