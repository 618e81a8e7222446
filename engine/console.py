"""What a program prints, how it is asked to stop, and how whatever goes wrong becomes one sentence and an exit code."""

import errno
import io
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from engine.processes import is_main, one_error, world_size
from errors import UserError


@contextmanager
def to_terminal() -> Iterator[None]:
    """Around printing: a terminal that was closed a moment before SIGHUP tells so does not end the step."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def say(line: str = "") -> None:
    """Print a line, on the one process that prints."""
    with to_terminal():
        if is_main():
            tqdm.write(line)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, enough inside one sentence."""
    if "trust_remote_code" in str(error):
        return "it brings its own code, which runs only with --trust-remote-code"
    return (str(error).strip().split("\n") or [""])[0][:200] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: on the GPU, on the CPU, or there to pin for a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and re.search("out of memory|can't allocate memory|not enough memory", str(error))
        is not None
    )


def try_with_less(work: Callable, with_less: Callable[[], str] | None, where: str, advice: str):
    """work(), and if the GPU runs out of memory once more after with_less(), which says what it has taken less of. That
    is called outside of `except`, whose traceback keeps tensors alive."""
    for less in (with_less, None):
        try:
            return work()
        except (
            torch.OutOfMemoryError,
            torch.AcceleratorError,
        ) as error:  # the allocator's word, and CUDA's own
            if not is_out_of_memory(error):
                raise
            if less is None:
                raise UserError(f"out of GPU memory {where}: set {advice}") from error
        print(f"out of GPU memory {where}: going on with {less()}", file=sys.stderr)


ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "take a disk that can be written",
    errno.EACCES: "allow this user to read and write it",
    errno.ENOENT: "put it back",
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR),
        "move the file, or the link to nothing, that is where a folder must be",
    ),
}


def exit_code(work: Callable[[], int], go_on: str, less_memory: str, if_unread: int = 2) -> int:
    """The exit code of work(); a user's mistake ends in one sentence on stderr. go_on: what to do after it;
    less_memory: which flags to set; if_unread: the code if nobody reads the output."""
    for stream in [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]:
        stream.reconfigure(errors="replace")  # a console without ± does not end a run
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    ):  # while modules were imported: without a traceback
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with one_error():
            return work()
    except UserError as error:
        sentence = str(error)
    except BrokenPipeError:  # Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if if_unread != 2:
            return if_unread
        sentence = f"nobody reads this output any more; {go_on}"
    except (OSError, SafetensorError) as error:  # that of safetensors has no errno
        advice = next(
            (text for code, text in ADVICE.items() if os.strerror(code) in str(error)), "mend that"
        )
        sentence = f"{first_line(error)}; {advice} and {go_on}, or give another --out"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sentence = f"out of memory ({first_line(error)}): {less_memory}"
    except KeyboardInterrupt:  # where there is nothing to finish or to save
        print(f"stopped; {go_on}", file=sys.stderr)
        return 130
    print(f"error: {sentence}", file=sys.stderr)
    return 2


class Stop:
    """SIGINT, SIGTERM and SIGHUP let the step finish and save; a second one of the first two ends the process at once,
    but not under torchrun, which may pass on what each process was sent already, and ends them by itself."""

    def __init__(self):
        self.signal, self.terminals = 0, [fd for fd in (1, 2) if os.isatty(fd)]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.ask)

    def ask(self, number: int, frame) -> None:
        for terminal in (
            self.terminals if number == signal.SIGHUP else ()
        ):  # it is closed: nothing can be printed
            os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        if self.signal:
            return
        self.signal, note = number, "\nfinishing the step, then saving"
        for n in (signal.SIGINT, signal.SIGTERM) if world_size() == 1 else ():
            signal.signal(n, signal.SIG_DFL)
            note = "\nfinishing the step, then saving; once more to stop at once"
        with suppress(OSError):
            os.write(
                2, f"{note}\n".encode() if is_main() else b""
            )  # print may be interrupted in a print


SECONDS = Counter()  # by phase, since a step began


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """As a decorator: the seconds that a function takes, the GPU's work included, are added to those of its phase."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    SECONDS[phase] += time.perf_counter() - started


class Progress:
    """A bar on a terminal; elsewhere a line about every twentieth of the run. shown: metrics, and their short names."""

    def __init__(self, steps: int, done: int, shown: dict[str, str]):
        self.steps, self.first, self.shown, self.started = steps, done, shown, time.perf_counter()
        self.bar = tqdm(
            total=steps,
            initial=done,
            disable=not (is_main() and sys.stderr.isatty()),
            bar_format="{n}/{total} |{bar:10}| {remaining} left{postfix}",
        )

    def show(self, line: dict) -> None:
        parts = [f"{short} {line[k]:.2f}" for k, short in self.shown.items() if line[k] is not None]
        parts += (
            [f"{line['tokens_per_second']:.0f} tok/s"] if line["tokens_per_second"] else []
        )  # SFT: none
        text, step = ", ".join(parts), line["step"]
        if self.bar.disable and (
            step % max(1, self.steps // 20) == 0 or step in (self.first + 1, self.steps)
        ):
            pace = (time.perf_counter() - self.started) / (step - self.first)
            say(f"step {step}/{self.steps}: {text}, {pace * (self.steps - step) / 60:.1f} min left")
        while (
            len(text) > shutil.get_terminal_size().columns - 36 and "," in text
        ):  # beside bar and time
            text = text.rpartition(",")[0]
        self.bar.set_postfix_str(text, refresh=False)
        with to_terminal():
            self.bar.update()
