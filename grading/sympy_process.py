"""sympy in a process of its own, for limits, integrals and infinite sums.

It takes [answer, golds] and says whether one equals the other, both as JSON. Each answer is
computed in a fork that has sympy loaded and is limited in memory and processor time, so that a slow
one costs CLOCK seconds and nothing else. The process starts when it is first needed, again when it
has died, and ends when its parent does.
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
from grading.tree import Node, Undefined, pairs
from grading.value import Evaluator, Number, mp

CLOCK, MEMORY = 0.7, 900 << 20  # seconds of processor time for one answer; bytes
PATIENCE = 60.0  # seconds by the clock that a caller waits, however crowded the machine
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

    def reply(self, request: list) -> bool:
        """Raises OSError and EOFError if the process has ended, TimeoutError after PATIENCE."""
        self.pipe.send_bytes(json.dumps(request).encode())
        if not self.pipe.poll(PATIENCE):
            raise TimeoutError
        return json.loads(self.pipe.recv_bytes())


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


def ask(answer: str, golds: list[str]) -> bool:
    """Whether the answer equals one of the golds; no, if that takes longer than CLOCK. Asks once
    more if the process had been killed."""
    with _lock:
        for _ in range(2):
            try:
                return running().reply([answer, golds])
            except TimeoutError:
                end()
                return False
            except (OSError, EOFError):
                end()
    return False


def serve() -> None:
    """The process's program: answers until the other end of the pipe is closed."""
    Evaluator.symbolic = _symbolic
    # These are meant for its parent, which may have answers yet to grade.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for text in (
        r"\sum_{n=0}^\infty \frac{1}{n!}",
        r"\int_0^1 x dx",
        r"\lim_{x \to 0} \frac{x}{x}",
    ):
        same(text, "0.3")  # so that sympy has loaded all that it needs
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe = Connection(int(sys.argv[1]))
    while True:
        try:
            answer, golds = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        if not os.fork():
            _answer(answer, golds)
        _, status = os.wait()
        pipe.send_bytes(json.dumps(os.waitstatus_to_exitcode(status) == 1).encode())


def _answer(answer: str, golds: list[str]) -> None:
    """Ends this process, with status 1 if the answer equals one of the golds."""
    status = 0
    try:
        signal.setitimer(signal.ITIMER_PROF, CLOCK)  # its signal ends this process
        for gold in golds:
            status = status or int(same(answer, gold))
    finally:
        os._exit(status)


def _symbolic(evaluator: Evaluator, node: Node) -> Number:
    """The value of a limit, integral or sum. What is too large for sympy ends this process."""
    parts = _to_sympy(node, evaluator.env).doit().evalf(mp.dps).as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts):
        raise Undefined("no number")
    re, im = (mp.mpf(str(part.evalf(mp.dps))) for part in parts)
    return mp.mpc(re, im) if im else re


# What sympy calls a function of ours; one that is not here has no value.
_CALLED = pairs("""
    asin asin acos acos atan atan sin sin cos cos tan tan cot cot sec sec csc csc sinh sinh
    cosh cosh tanh tanh exp exp ln log log log abs Abs floor floor ceil ceiling binom binomial
    fact factorial fact2 factorial2 add Add mul Mul pow Pow sum Sum prod Product int Integral
    pi pi e E i I oo oo
""")


def _to_sympy(node: Node, env: dict):
    """The sympy expression of a tree, of nodes and numbers only. env maps names to Fractions and to
    bound symbols."""
    import sympy

    kind, *parts = node
    if kind in ("num", "sym"):
        value = parts[0] if kind == "num" else env[parts[0]]
        return sympy.Rational(*value.as_integer_ratio()) if isinstance(value, Fraction) else value
    if kind == "const":
        return getattr(sympy, _CALLED[parts[0]])
    if kind == "big":
        kind, name, low, high, body = parts
        symbol = sympy.Dummy(name, integer=kind in ("sum", "prod") or None)
        body = _to_sympy(body, env | {name: symbol})
        low, high = _to_sympy(low, env), _to_sympy(high, env)
        if kind == "lim":
            return sympy.Limit(body, symbol, low)
        return getattr(sympy, _CALLED[kind])(body, (symbol, low, high))
    args = [_to_sympy(part, env) for part in parts]
    if kind == "neg":
        return -args[0]
    if kind == "div":
        return args[0] / args[1]
    if kind == "root":
        return args[0] ** (1 / args[1])
    return getattr(sympy, _CALLED[kind])(*args)
