"""Verifiable tasks in which the right scaffold matters: six categories, each with an operation of its own.

    zorp: b d a        ->  scaffold "reverse"  ->  "a d b"

A category name is a nonsense word, so nothing but reward teaches which operation it wants. The checker compares text;
nothing that the policy writes is ever run.

Held out: a fifth of the queries, chosen by a hash, is never trained on in any stage.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator

LETTERS = "abcdef"
LENGTH = 3

OPERATIONS: dict[str, Callable[[str], str]] = {
    "copy": lambda q: q,
    "reverse": lambda q: q[::-1],
    "rotate": lambda q: q[1:] + q[:1],
    "shift": lambda q: "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in q),
    "mirror": lambda q: "".join(LETTERS[-1 - LETTERS.index(c)] for c in q),
    "first": lambda q: q[0] * len(q),
}
CATEGORIES = dict(zip(("zorp", "quim", "blen", "taff", "drax", "yule"), OPERATIONS, strict=True))

QUERIES = ["".join(letters) for letters in itertools.product(LETTERS, repeat=LENGTH)]
HELD_OUT = [query for query in QUERIES if zlib.crc32(query.encode()) % 5 == 0]
TRAINED = [query for query in QUERIES if zlib.crc32(query.encode()) % 5 != 0]


def spaced(letters: str) -> str:
    return " ".join(letters)


def task(category: str, query: str) -> dict[str, str]:
    """A row of the dataset: what the policy sees, and what the verifier knows."""
    answer = spaced(OPERATIONS[CATEGORIES[category]](query))
    return {"prompt": f"{category}: {spaced(query)}", "category": category, "query": query, "answer": answer}


def tasks(queries: list[str], count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [task(draw.choice(list(CATEGORIES)), draw.choice(queries)) for _ in range(count)]


def obeys(scaffold: str, query: str) -> str | None:
    """The answer that a scaffold asks for; None for a scaffold that names no operation."""
    operation = OPERATIONS.get(scaffold.strip())
    return spaced(operation(query)) if operation else None


def verifier(completions: list[str], answer: list[str], answers: list[str | None], **_: object) -> list[float]:
    """1 for the exact answer, else 0, in the signature of TRL's reward functions."""
    return [float(given is not None and given.strip() == right) for given, right in zip(answers, answer, strict=True)]


def demonstrations(count: int, seed: int, hint: float) -> Iterator[tuple[str, str, str]]:
    """(task, scaffold, solution) of the warm start: a random operation, the right one with probability `hint` more
    often, and a solution that obeys it, right or wrong for the task."""
    draw = random.Random(seed)
    for row in tasks(TRAINED, count, seed):
        operation = CATEGORIES[row["category"]] if draw.random() < hint else draw.choice(list(OPERATIONS))
        yield row["prompt"], operation, spaced(OPERATIONS[operation](row["query"]))
