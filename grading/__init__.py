"""What counts as the same answer: text -> tree -> value, two trees -> equal?, and sympy.

words.py          tables of commands and words, unusual spellings -> usual ones
units.py          units, counted things, money, number words
lexer.py          text -> tokens
parser.py         tokens -> tree (tree.py: the nodes)
statement.py      what relations and plus-minus signs state
value.py          tree -> value
equal.py          two trees -> equal? (region.py: sets of reals)
answer.py         two texts -> equal?
sympy_process.py  limits, integrals and infinite sums, in a process of their own

Imports nothing from the rest of the project. The rules are told in words in reward.py.
"""
