"""Which problems of a benchmark also stand in a training set."""

import re

from data import Problem


def contaminated(problems: list[Problem], training: list[Problem]) -> set[str]:
    """Return the sources of the problems that (nearly) stand in the training set.

    Two questions count as one problem if their shingles have a Jaccard similarity of at least 0.42.
    On the paper's files that holds for 6 of MATH-500 and 8 of OlympiadBench, with a gap: the least
    similar of the 14 has 0.47 (the same figure, another question), the most similar other one 0.37.
    """
    training_shingles = [shingles(p.question) for p in training]
    sources = set()
    for p in problems:
        own = shingles(p.question)
        for other in training_shingles:
            common = len(own & other)
            if common >= 0.42 * (len(own) + len(other) - common):
                sources.add(p.source)
                break
    return sources


def shingles(question: str) -> set[str]:
    """Return the 12-character pieces of the question's letters and digits.

    Figures ([asy]), forum tags, LaTeX commands, blanks and punctuation are left out first.
    """
    text = re.sub(r"(?s)\[asy\].*?(\[/asy\]|$)", " ", question.lower())
    text = re.sub(r"\[/?\w+\]|\\[a-z]+", " ", text)
    text = re.sub(r"[^a-z0-9]", "", text)
    return {text[i : i + 12] for i in range(max(1, len(text) - 11))}
