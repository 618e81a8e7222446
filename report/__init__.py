"""This package looks at runs: `eval.py plot`, `compare`, `show` and `pack`, and report.md."""

COMMANDS = ("plot", "compare", "show", "pack")
