"""What counts as the same answer: text -> tree -> value, two trees -> equal?, and sympy in a process of its own.

lexer.py     text -> tokens (words.py: the tables)     statement.py   what relations and plus-minus signs state
parser.py    tokens -> tree (tree.py: the nodes)       equal.py       two trees -> equal?  (region.py: sets of reals)
value.py     tree -> value                             answer.py      two texts -> equal?
units.py     units and counted things                  sympy_process.py  limits, integrals, infinite sums

Imports nothing from the rest of the project. The rules are told in words in reward.py.
"""
