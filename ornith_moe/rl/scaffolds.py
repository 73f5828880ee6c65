"""Scaffolds as text: prompts of both stages, how completions are read, and which scaffolds are in use.

    task, scaffold in use  --propose_prompt-->  policy  --read_scaffold-->  scaffold, refined
    task, scaffold         --solve_prompt---->  policy  --read_answer---->  answer, to the verifier
    scaffold, its value    --offer----------->  memory  --in_use--------->  the next prompt of that category

The policy itself refines: what it is shown is a scaffold that worked, what it writes is the next one. Nothing mutates
text by rule. A memory keeps, per category of tasks, the scaffolds of the highest value that were measured lately; the
policy that a value was measured with fades, so an old value is worth little.

Reading. Thoughts end at the last `</think>`, whether or not `<think>` was written (a chat template may have), and count
for nothing. What is read is the one region between its tags in the rest, with nested tags of that name kept in it.
Failures, which strike a completion out: thoughts or a region that do not end, an end without a begin, no region, more
than one, an empty one. With empty tags the whole rest is read, which suits policies of a few tokens.

No torch: text in, text out, deterministic; randomness only from a generator that is handed in.

Sources: two stages, a policy that refines its own scaffold per task category, second-hand (restatements of Ornith's
blog); templates, reading, memory, ours.
"""

import math
import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Tags = tuple[str, str]  # begin and end, or two empty strings

_PROPOSE = """\
Write a scaffold for the task below: how to go about it in steps, which tools to use, what to check, when to stop. Do \
not solve the task. Whoever solves it sees the task and your scaffold.

Task:
{task}

{previous}Write the scaffold between <scaffold> and </scaffold>."""
_PREVIOUS = """\
A scaffold that was used for such tasks before:
{scaffold}

Keep what is good in it, correct the rest.

"""
_SOLVE = """\
Solve the task below, following the scaffold.

Task:
{task}

Scaffold:
{scaffold}

Write the answer between <answer> and </answer>."""


class Reading(NamedTuple):
    """What a completion holds: `text`, or None and in `failure` why; `thoughts` in any case, "" without."""

    text: str | None
    thoughts: str
    failure: str | None


@dataclass(frozen=True)
class Stages:
    """Templates of both prompts, and the tags by which completions are read.

    Attributes:
        propose_template: holds {task}, and {previous} unless scaffolds are written without a look at the last one.
        previous_template: holds {scaffold}; stands at {previous} where there is a scaffold in use, else nothing does.
        solve_template: holds {task} and {scaffold}.
        scaffold_tags, answer_tags, think_tags: (begin, end), or ("", "") for none.
    Raises:
        ValueError: a template with other fields, or tags of which one is empty or that are equal.
    Example:
        >>> plain = Stages("{task} plan:", "", "{task} plan: {scaffold} answer:", ("", ""), ("", ""))
        >>> plain.solve_prompt("abc", "reverse")
        'abc plan: reverse answer:'
    """

    propose_template: str = _PROPOSE
    previous_template: str = _PREVIOUS
    solve_template: str = _SOLVE
    scaffold_tags: Tags = ("<scaffold>", "</scaffold>")
    answer_tags: Tags = ("<answer>", "</answer>")
    think_tags: Tags = ("<think>", "</think>")

    def __post_init__(self) -> None:
        for name, needed, allowed in (
            ("propose_template", {"task"}, {"task", "previous"}),
            ("previous_template", set(), {"scaffold"}),
            ("solve_template", {"task", "scaffold"}, {"task", "scaffold"}),
        ):
            fields = {field for _, field, _, _ in string.Formatter().parse(getattr(self, name)) if field is not None}
            if not needed <= fields <= allowed:
                raise ValueError(
                    f"{name}: expected the fields {_braced(allowed)}, got {_braced(fields) or 'none'}; "
                    "write {{ and }} for braces of the text"
                )
        for name in ("scaffold_tags", "answer_tags", "think_tags"):
            begin, end = getattr(self, name)
            if (begin or end) and (not begin or not end or begin == end):
                raise ValueError(f"{name}: expected two different tags, or two empty ones, got {(begin, end)}")

    def propose_prompt(self, task: str, previous: str | None) -> str:
        """The prompt of stage 1. `previous`: the scaffold in use, or None."""
        shown = "" if previous is None else self.previous_template.format(scaffold=previous)
        return self.propose_template.format(task=task, previous=shown)

    def solve_prompt(self, task: str, scaffold: str) -> str:
        """The prompt of stage 2."""
        return self.solve_template.format(task=task, scaffold=scaffold)

    def read_scaffold(self, completion: str) -> str | None:
        """The scaffold in a completion of stage 1; None strikes it out (`read` says why)."""
        return read(completion, self.scaffold_tags, self.think_tags).text

    def read_answer(self, completion: str) -> str | None:
        """The answer in a completion of stage 2; None strikes it out (`read` says why)."""
        return read(completion, self.answer_tags, self.think_tags).text


def read(completion: str, tags: Tags, think_tags: Tags = ("<think>", "</think>")) -> Reading:
    """The one region between `tags` after the thoughts, without white space around it.

    Example:
        >>> read("so... </think> <answer> 42 </answer>", ("<answer>", "</answer>"))
        Reading(text='42', thoughts='so...', failure=None)
        >>> read("<answer>4", ("<answer>", "</answer>")).failure
        '<answer> without </answer>'
    """
    think, think_end = think_tags
    thoughts, rest = "", completion
    if think_end and think_end in completion:
        thoughts, _, rest = completion.rpartition(think_end)
        thoughts = thoughts.strip().removeprefix(think).strip()
    if think and think in rest:
        return Reading(None, thoughts or rest.partition(think)[2].strip(), f"{think} without {think_end}")
    if not tags[0]:
        text = rest.strip()
        return Reading(text, thoughts, None) if text else Reading(None, thoughts, "nothing written")
    regions, failure = _regions(rest, *tags)
    if failure is None and len(regions) != 1:
        failure = f"{tags[0]} {len(regions)} times, expected once"
    if failure is None and not regions[0].strip():
        failure = f"nothing between {tags[0]} and {tags[1]}"
    return Reading(None, thoughts, failure) if failure else Reading(regions[0].strip(), thoughts, None)


@dataclass
class _Kept:
    """A scaffold in memory. Values offered at one step are averaged, so their order does not matter."""

    step: int  # when it was last offered
    total: float
    count: int
    before: float | None  # its value before that step

    def value(self, blend: float) -> float:
        now = self.total / self.count
        return now if self.before is None else (1 - blend) * self.before + blend * now


class ScaffoldMemory:
    """Per category of tasks the scaffolds in use, by value.

        value = mean of what one step offers, blended with what was before: (1 - blend) * before + blend * mean

    Args:
        capacity: scaffolds kept per category.
        max_age: steps after which a scaffold that was not offered again is forgotten.
        blend: share of a new measurement, above 0 and up to 1.

    Steps are updates of the policy. With several processes offer the same to each, in any order within a step. A
    struck scaffold is not offered. `state_dict` is plain JSON, and a memory that loads it goes on as if uninterrupted.
    """

    def __init__(self, capacity: int = 4, max_age: int = 100, blend: float = 0.5):
        if capacity < 1 or max_age < 0 or not 0 < blend <= 1:
            raise ValueError(
                "capacity, max_age, blend: expected at least 1, at least 0, and a share in (0, 1], "
                f"got {capacity}, {max_age} and {blend}"
            )
        self.capacity, self.max_age, self.blend = capacity, max_age, blend
        self.step = 0  # the latest that was offered
        self._kept: dict[str, dict[str, _Kept]] = {}

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories with a scaffold in use, sorted."""
        return tuple(sorted(category for category in self._kept if self._ranked(category)))

    def offer(self, category: str, scaffold: str, value: float, step: int) -> None:
        """Measured at `step`: the mean reward of the scaffold's valid rollouts. Steps do not fall.

        Raises:
            ValueError: a value that is not finite, or a step before the latest.
        """
        if not math.isfinite(value):
            raise ValueError(f"value: expected a finite number, got {value}; a struck scaffold is not offered")
        if step < self.step:
            raise ValueError(f"step: expected {self.step} or later, got {step}; restore the memory with the policy")
        if step > self.step:
            self.step = step
            for name in self._kept:  # only now: whether a scaffold stays does not depend on the order within a step
                self._kept[name] = dict(self._ranked(name))
        kept = self._kept.setdefault(category, {})
        entry = kept.get(scaffold)
        if entry is None:
            kept[scaffold] = _Kept(step, value, 1, None)
        elif entry.step == step:
            entry.total, entry.count = entry.total + value, entry.count + 1
        else:
            kept[scaffold] = _Kept(step, value, 1, entry.value(self.blend))

    def in_use(self, category: str, generator: random.Random | None = None) -> str | None:
        """The scaffold to show in `propose_prompt`: the best, or one of those kept, drawn evenly; None without any."""
        ranked = self._ranked(category)
        if not ranked:
            return None
        return (ranked[0] if generator is None else generator.choice(ranked))[0]

    def kept(self, category: str) -> list[tuple[str, float]]:
        """(scaffold, value), the best first; of equal values the latest, then by text."""
        return [(scaffold, entry.value(self.blend)) for scaffold, entry in self._ranked(category)]

    def age(self, category: str, step: int) -> int:
        """Steps since the best scaffold of a category was last measured; 0 without one."""
        ranked = self._ranked(category)
        return step - ranked[0][1].step if ranked else 0

    def state_dict(self) -> dict[str, Any]:
        """What a memory has learnt, as JSON; `capacity`, `max_age` and `blend` are the caller's to repeat."""
        kept = {
            category: [[text, e.step, e.total, e.count, e.before] for text, e in sorted(entries.items())]
            for category, entries in sorted(self._kept.items())
        }
        return {"step": self.step, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what is kept by what `state_dict` gave, of this class or read from JSON.

        Raises:
            ValueError: not of that form; the memory is then as it was.
        """
        try:
            step = int(state["step"])
            kept = {
                str(category): {
                    str(text): _Kept(int(at), float(total), int(count), None if before is None else float(before))
                    for text, at, total, count, before in entries
                }
                for category, entries in state["kept"].items()
            }
            sound = all(e.count > 0 and e.step <= step for entries in kept.values() for e in entries.values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"state: expected what state_dict gives, got another form ({error!r})") from None
        if not sound:
            raise ValueError("state: expected counts above 0 and no step after the latest; the file was changed")
        self.step, self._kept = step, kept

    def _ranked(self, category: str) -> Sequence[tuple[str, _Kept]]:
        fresh = [
            (text, entry)
            for text, entry in self._kept.get(category, {}).items()
            if self.step - entry.step <= self.max_age
        ]
        return sorted(fresh, key=lambda item: (-item[1].value(self.blend), -item[1].step, item[0]))[: self.capacity]


def _regions(text: str, begin: str, end: str) -> tuple[list[str], str | None]:
    """What stands between outermost pairs of tags, and what is wrong with the pairs."""
    regions: list[str] = []
    depth = start = 0
    for tag in re.finditer(f"{re.escape(begin)}|{re.escape(end)}", text):
        if tag.group() == begin:
            start = start if depth else tag.end()
            depth += 1
        elif not depth:
            return regions, f"{end} without {begin}"
        else:
            depth -= 1
            if not depth:
                regions.append(text[start : tag.start()])
    return regions, f"{begin} without {end}" if depth else None


def _braced(fields: set[str]) -> str:
    return ", ".join(f"{{{field}}}" for field in sorted(fields))
