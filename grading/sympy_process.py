"""sympy in a process of its own, for limits, integrals and infinite sums.

Few answers need it, so each starts a process, which imports sympy (half a second) and is limited
in memory and processor time. It reads [answer, golds] and prints whether one equals the other.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from fractions import Fraction

from grading.answer import same
from grading.tree import Node, pairs
from grading.value import Evaluator, Number, mp

CLOCK, MEMORY = 0.9, 900 << 20  # seconds of processor time for one answer; bytes
PATIENCE = 60.0  # seconds by the clock that a caller waits, however crowded the machine
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PROGRAM = f"""
import sys
sys.path.insert(0, {_ROOT!r})
import sympy
from grading.sympy_process import _answer
_answer()
"""


def ask(answer: str, golds: list[str]) -> bool:
    """Whether the answer equals one of the golds; no, if that takes longer than CLOCK."""
    try:
        process = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=json.dumps([answer, golds]),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            start_new_session=True,  # Ctrl-C is for the caller, which may have answers to grade
        )
    except subprocess.TimeoutExpired:
        return False
    return process.stdout == "True"


def _answer() -> None:
    """The process's program."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.setitimer(signal.ITIMER_PROF, CLOCK)  # its signal ends this process
    Evaluator.symbolic = _symbolic
    answer, golds = json.load(sys.stdin)
    print(any(same(answer, gold) for gold in golds), end="")


def _symbolic(evaluator: Evaluator, node: Node) -> Number:
    """The value of a limit, integral or sum. What is too large for sympy ends this process."""
    value = _to_sympy(node, evaluator.env).doit().evalf(mp.dps)
    real, imaginary = value.as_real_imag()
    return mp.mpc(str(real), str(imaginary))  # raises ValueError if there are letters in it


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
