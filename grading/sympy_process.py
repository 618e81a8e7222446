"""sympy in a process of its own, for limits, integrals and infinite sums.

It takes [answer, golds] and says whether one equals the other, both as JSON. It limits its own memory and processor
time, and ends when its parent does. It starts when it is first needed, and again when it has died or was too slow.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from grading.answer import same
from grading.tree import Node, Undefined
from grading.value import Evaluator, Number, mp

CLOCK, MEMORY = 0.7, 900 << 20  # seconds for one answer; bytes
START, RESTART = 10.0, 1.0  # seconds that one answer waits for it to be ready
PATIENCE = 60.0  # seconds more that a caller may wait on a crowded machine
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PROGRAM = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); from grading.sympy_process import serve; serve()"
)


class Process(subprocess.Popen):
    """The other end of the pipe is inherited; its number is the program's argument."""

    def __init__(self):
        self.pipe, other = Pipe()
        super().__init__(
            [sys.executable, "-c", _PROGRAM, str(other.fileno())],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        other.close()
        self.ready = False

    def starts(self, seconds: float) -> bool:
        """Whether it is ready in that time. Raises OSError and EOFError if it has ended, as `reply` does."""
        self.ready = self.ready or self.pipe.poll(seconds) and bool(self.pipe.recv_bytes())
        return self.ready

    def reply(self, request: list, seconds: float) -> bool | None:
        """None if there is none in that time."""
        self.pipe.send_bytes(json.dumps(request).encode())
        return json.loads(self.pipe.recv_bytes()) if self.pipe.poll(seconds) else None


_lock, _running = threading.Lock(), []  # at most one process


def running() -> Process:
    if not _running:
        _running.append(Process())
    return _running[0]


def end() -> None:
    while _running:
        process = _running.pop()
        process.pipe.close()
        process.kill()
        process.wait()


def _forget() -> None:
    """A forked child must not talk to its parent's process."""
    global _lock, _running
    _lock, _running = threading.Lock(), []


os.register_at_fork(after_in_child=_forget)
atexit.register(end)


def ask(answer: str, golds: list[str], patience: float = 0.0) -> bool:
    """Whether the answer equals one of the golds; no, if that takes longer than CLOCK and the caller's patience."""
    with _lock:
        wait, reply = RESTART if _running else START, None
        try:
            if not running().starts(wait + patience):
                return False  # too late for this answer, not for the next
            reply = running().reply([answer, golds], CLOCK + patience)
        except (OSError, EOFError):  # it has ended, or there is no process to be had
            pass
        if reply is None:
            end()
            running()
    return bool(reply)


def serve() -> None:
    """The process's program: answers until the other end of the pipe is closed."""
    Evaluator.symbolic = _symbolic
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # meant for its parent, which may have answers yet to grade
        signal.signal(number, signal.SIG_IGN)
    import sympy  # noqa: F401  before the limit and before "ready", so that the clock measures only the work

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe = Connection(int(sys.argv[1]))
    for text in (
        r"\sum_{n=0}^{\infty} \frac{1}{n!}",
        r"\int_0^1 x^2 dx",
        r"\lim_{x \to 0} \frac{\sin x}{x}",
    ):
        same(text, "0.5")  # so that sympy has loaded what it loads late
    pipe.send_bytes(b"ready")
    while True:
        try:
            answer, golds = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.setitimer(
            signal.ITIMER_PROF, CLOCK
        )  # of processor time: the signal it sends ends this process
        pipe.send_bytes(json.dumps(any(same(answer, gold) for gold in golds)).encode())


def _symbolic(evaluator: Evaluator, node: Node) -> Number:
    """The value of a limit, integral or sum. What is too large for sympy is so for this process, which then ends."""
    parts = _to_sympy(node, evaluator.env).doit().evalf(mp.dps).as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts):
        raise Undefined("no number")
    re, im = (mp.mpf(str(part.evalf(mp.dps))) for part in parts)
    return mp.mpc(re, im) if im else re


_CALLED = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "abs": "Abs",
    "ceil": "ceiling",
    "ln": "log",
    "binom": "binomial",
    "fact": "factorial",
    "pow": "Pow",
    "add": "Add",
    "mul": "Mul",
    "sum": "Sum",
    "prod": "Product",
    "int": "Integral",
    "lim": "Limit",
}
_CALLED |= {name: name for name in "floor log sin cos tan cot sec csc sinh cosh exp".split()}


def _to_sympy(node: Node, env: dict):
    """The sympy expression of a tree, of nodes and numbers only. env maps names to Fractions and to bound symbols."""
    import sympy

    kind, *parts = node
    if kind in ("num", "sym"):
        value = parts[0] if kind == "num" else env[parts[0]]
        return sympy.Rational(*value.as_integer_ratio()) if isinstance(value, Fraction) else value
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[parts[0]]
    if kind in ("big", "int", "lim"):
        (kind, name, *bounds), body = (parts if kind == "big" else node)[:-1], node[-1]
        symbol = sympy.Dummy(name, integer=kind in ("sum", "prod") or None)
        bounds, body = (
            [_to_sympy(bound, env) for bound in bounds],
            _to_sympy(body, env | {name: symbol}),
        )
        return getattr(sympy, _CALLED[kind])(
            body, *((symbol, *bounds) if kind == "lim" else [(symbol, *bounds)])
        )
    args = [_to_sympy(part, env) for part in parts]
    if kind in ("div", "root", "neg"):
        return (
            -args[0]
            if kind == "neg"
            else args[0] / args[1]
            if kind == "div"
            else args[0] ** (1 / args[1])
        )
    return getattr(sympy, _CALLED[kind])(
        *args
    )  # KeyError, which has no value: a function not in the table
