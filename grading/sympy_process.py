"""sympy in a process of its own, for limits, integrals and infinite sums.

It takes [answer, golds] and gives [format, accuracy], both as JSON. It imports sympy, limits its own memory and
processor time, and ends when its parent does. It starts when it is first needed; one that has died or hangs is
replaced. An answer that needs it while it is still starting, or for longer than CLOCK, counts as wrong.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from grading.answer import readable, same
from grading.tree import Node, Undefined, names
from grading.value import Evaluator, Number, mp

CLOCK, MEMORY = 0.7, 900 << 20                            # seconds for one answer; bytes
PATIENCE = 60.0                                           # seconds more that a caller may wait on a crowded machine
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PROGRAM = f"import sys; sys.path.insert(0, {_ROOT!r}); from grading.sympy_process import serve; serve()"


# ----------------------------------------------------------------------------------------------------- the parent's side

class Process:
    def __init__(self):
        self.pipe, other = Pipe()
        self.process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(other.fileno())],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, pass_fds=[other.fileno()])
        self.ready = False
        other.close()

    def reply(self, deadline: float):
        """The next message, None if there is none in time."""
        return json.loads(self.pipe.recv_bytes()) if self.pipe.poll(max(0, deadline - time.monotonic())) else None

    def starts(self, deadline: float) -> bool:
        self.ready = self.ready or self.reply(deadline) == "ready"
        return self.ready

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


_lock, _running = threading.Lock(), []                    # at most one process


def _forget() -> None:
    """A forked child must not talk to its parent's process."""
    global _lock, _running
    _lock, _running = threading.Lock(), []


def running() -> Process:
    if not _running:
        _running.append(Process())
    return _running[0]


def end() -> None:
    while _running:
        _running.pop().end()


os.register_at_fork(after_in_child=_forget)
atexit.register(end)


def ask(answer: str, golds: list[str], patience: float = 0.0) -> list | None:
    """[format, accuracy] as the process sees it, None without an answer in CLOCK seconds (plus patience)."""
    deadline, lock = time.monotonic() + CLOCK, _lock
    if not lock.acquire(timeout=CLOCK + patience):
        return None
    try:
        process = running()
        in_time = process.starts(deadline + patience) and (patience or deadline - time.monotonic() > CLOCK / 2)
        if not in_time:                                   # it started too late for this answer, not for the next
            return None
        process.pipe.send_bytes(json.dumps([answer, golds]).encode())
        reply = process.reply(time.monotonic() + CLOCK + patience if patience else deadline)
        if reply is None:
            end()
            running()
        return reply
    except (OSError, EOFError):                           # it has ended, or there is no process to be had
        end()
        return None
    finally:
        lock.release()


# ------------------------------------------------------------------------------------------------------ the other side

def serve() -> None:
    """Answers until the other end of the pipe, whose number is the program's argument, is closed."""
    Evaluator.symbolic = _symbolic
    for number in (signal.SIGINT, signal.SIGTERM):        # meant for its parent, which may have answers yet to grade
        signal.signal(number, signal.SIG_IGN)
    import sympy  # noqa: F401  before the limit and before "ready", so that the clock measures only the work
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe, reply = Connection(int(sys.argv[1])), "ready"
    while True:
        pipe.send_bytes(json.dumps(reply).encode())
        try:
            answer, golds = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, CLOCK)       # of processor time: the signal it sends ends this process
        reply = [float(readable(answer)), float(any(same(answer, gold) for gold in golds))]


def _symbolic(evaluator: Evaluator, node: Node) -> Number:
    """The value of a limit, integral or sum."""
    parts = _to_sympy(node, evaluator.env).doit().evalf(mp.dps).as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts):
        raise Undefined("no number")
    re, im = (mp.mpf(str(part.evalf(mp.dps))) for part in parts)
    return mp.mpc(re, im) if im else re


_CALLED = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "abs": "Abs", "ceil": "ceiling", "ln": "log",
           "binom": "binomial", "fact": "factorial", "neg": "Mul", "pow": "Pow", "add": "Add", "mul": "Mul"}
_CALLED |= {name: name for name in "floor log sin cos tan cot sec csc sinh cosh exp".split()}


def _to_sympy(node: Node, env: dict):
    """The sympy expression of a tree. env maps names to Fractions and bound names to symbols. Only nodes and numbers
    are handed to sympy, a constant power or factorial only after the guards of value.py have passed it."""
    import sympy
    kind, *parts = node
    if kind in ("pow", "fact", "num", "binom") and (value := _guarded(node, env)) is not None:
        return value
    if kind == "sym":
        value = env[parts[0]]
        return sympy.Rational(value.numerator, value.denominator) if isinstance(value, Fraction) else value
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[parts[0]]
    if kind in ("big", "int", "lim"):
        name, *bounds, body = parts[1:] if kind == "big" else parts
        symbol = sympy.Dummy(name, integer=True) if kind == "big" else sympy.Dummy(name)
        bounds, body = [_to_sympy(bound, env) for bound in bounds], _to_sympy(body, env | {name: symbol})
        if kind == "lim":
            return sympy.Limit(body, symbol, *bounds)
        return {"sum": sympy.Sum, "prod": sympy.Product, "int": sympy.Integral}[
            parts[0] if kind == "big" else kind](body, (symbol, *bounds))
    args = [_to_sympy(part, env) for part in parts]
    if kind in ("div", "root"):
        return args[0] / args[1] if kind == "div" else args[0] ** (1 / args[1])
    if kind not in _CALLED:
        raise Undefined(f"{kind} in a limit, integral or sum")
    return getattr(sympy, _CALLED[kind])(*args, *[-1] * (kind == "neg"))


def _guarded(node: Node, env: dict):
    """The number that a constant node is, if it is rational. Raises Undefined if it is out of reach."""
    import sympy
    evaluator = Evaluator()
    try:
        value = evaluator.value(node, {name: value for name, value in env.items() if isinstance(value, Fraction)})
    except Undefined:
        if not any(isinstance(env.get(name), sympy.Symbol) for name in names(node)):
            raise
        return None
    if evaluator.rounded:
        raise Undefined("out of reach")
    return sympy.Rational(value.numerator, value.denominator) if isinstance(value, Fraction) else None
