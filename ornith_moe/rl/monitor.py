"""The outer boundary of self-scaffolding: what no scaffold can widen, and what strikes a rollout out.

    verdict = rules(surface, attempt)                  deterministic, from what the environment observed
    verdict = verdict or veto(attempt)                 optional, a callable that may only strike

A policy that writes its own scaffold may change how it works, not what it may touch: the surface is given once, is
frozen, and is in no prompt's power. Rules that are built in:

    forbidden_reads    a file that is hidden, or not readable by the surface
    verifier_edits     a write, removal or rename of a file of the verifier
    outside_surface    a tool, an argument, a file or a parameter that the surface does not name; a scaffold whose
                       text names a file that is hidden, or of the verifier and not readable, or that is too long

They judge what a sandbox saw (`Call`), with paths resolved by it, not what a completion says it did. A rule that fails
is a bug and raises. A veto that fails, by a judge that cannot be reached, strikes: letting through what was not judged
would teach it. That is harmless under `struck="drop"`, where a struck rollout is out of every mean; under "punish" an
outage would punish, so choose `on_error="raise"` there.

Files are relative to the workspace, with `/`. A pattern is a file, a folder and all in it (`tests/`), or has `*` and
`?`, which match `/` too.

No torch. Deterministic but for the veto. Sources: an immutable outer boundary, a deterministic monitor and a judge that
may only veto, second-hand (restatements of Ornith's blog); which rules, ours.
"""

import fnmatch
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ornith_moe.quant.errors import brief


class Verdict(NamedTuple):
    """Whether an attempt is struck out, and why: one sentence each."""

    struck: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Surface:
    """What an attempt may touch. Frozen, and so is what it holds: it keeps copies that cannot be written to.

    Attributes:
        tools: name of each tool and the arguments that it takes.
        readable, writable: patterns of files. hidden: patterns never read, whatever `readable` says.
        verifier: patterns of what decides the reward; never written, whatever `writable` says.
        parameters: what a scaffold may set, and from where to where (both included).
        max_scaffold_length: characters.
    """

    tools: Mapping[str, Iterable[str]] = field(default_factory=dict)
    readable: Sequence[str] = ()
    writable: Sequence[str] = ()
    hidden: Sequence[str] = ()
    verifier: Sequence[str] = ()
    parameters: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    max_scaffold_length: int = 20_000

    def __post_init__(self) -> None:
        for name in ("readable", "writable", "hidden", "verifier"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
                raise ValueError(f"{name}: expected patterns of files, got {brief(patterns)}; write a list of texts")
            object.__setattr__(self, name, tuple(patterns))
        for name, (low, high) in self.parameters.items():
            if not low <= high:
                raise ValueError(f"parameters[{name!r}]: expected a range from low to high, got {low} to {high}")
        tools = {tool: frozenset(arguments) for tool, arguments in self.tools.items()}
        object.__setattr__(self, "tools", MappingProxyType(tools))
        ranges = {name: (float(low), float(high)) for name, (low, high) in self.parameters.items()}
        object.__setattr__(self, "parameters", MappingProxyType(ranges))


@dataclass(frozen=True)
class Call:
    """One use of a tool as the sandbox saw it: files by their resolved paths; a rename writes both names."""

    tool: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reads: Sequence[str] = ()
    writes: Sequence[str] = ()


@dataclass(frozen=True)
class Attempt:
    """What is judged: a scaffold alone (`solution` None), or a rollout under it.

    Attributes:
        scaffold, solution: text. task: the row of the data set. calls: in order.
        parameters: what the scaffold set, as the harness read it.
    """

    scaffold: str | None = None
    solution: str | None = None
    task: Mapping[str, Any] = field(default_factory=dict)
    calls: Sequence[Call] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


Rule = Callable[[Surface, Attempt], Iterable[str]]
Veto = Callable[[Attempt], str | None]


def forbidden_reads(surface: Surface, attempt: Attempt) -> Iterator[str]:
    """Files that were read although hidden or not readable."""
    for call in attempt.calls:
        for path in call.reads:
            place = _inside(path)
            if place is None or not _matches(place, surface.readable):
                yield f"{call.tool}: read {brief(path)}, which is not readable"
            elif _matches(place, surface.hidden):
                yield f"{call.tool}: read {brief(path)}, which is hidden"


def verifier_edits(surface: Surface, attempt: Attempt) -> Iterator[str]:
    """Files of the verifier that were written, or a folder around them."""
    for call in attempt.calls:
        for path in call.writes:
            place = _inside(path)
            if place is not None and _touches(place, surface.verifier):
                yield f"{call.tool}: wrote {brief(path)}, which belongs to the verifier"


def outside_surface(surface: Surface, attempt: Attempt) -> Iterator[str]:
    """Tools, arguments, written files and parameters that the surface does not name; what a scaffold must not name."""
    for call in attempt.calls:
        if call.tool not in surface.tools:
            yield f"{brief(call.tool)}: no tool of the surface"
            continue
        for name in sorted(map(str, set(call.arguments) - set(surface.tools[call.tool]))):
            yield f"{call.tool}: {brief(name)} is no argument of it"
        for path in call.writes:
            place = _inside(path)
            if place is None or not _matches(place, surface.writable):
                yield f"{call.tool}: wrote {brief(path)}, which is not writable"
    for name, value in sorted(attempt.parameters.items()):
        low, high = surface.parameters.get(name, (math.nan, math.nan))
        if math.isnan(low):
            yield f"{brief(name)}: no parameter of the surface"
        elif isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            yield f"{name}: {brief(value)} is not from {low:g} to {high:g}"
    yield from _named(surface, attempt.scaffold or "")


RULES: tuple[Rule, ...] = (forbidden_reads, verifier_edits, outside_surface)


@dataclass(frozen=True)
class Monitor:
    """Strikes attempts out; there is no way to take a strike back.

    Args:
        surface: the boundary.
        rules: each yields one sentence per offence; own ones as `(*RULES, mine)`. All of them are run.
        veto: asked about what the rules let pass; a sentence strikes, None does not.
        on_error: what an exception of the veto does: "strike" with its message, or "raise".
    Example:
        >>> monitor = Monitor(Surface(tools={"run": {"code"}}, readable=["src/"], hidden=["src/answers.txt"]))
        >>> monitor.judge(calls=[Call("run", {"code": "..."}, reads=["src/answers.txt"])]).reasons
        ("run: read 'src/answers.txt', which is hidden",)
    """

    surface: Surface = field(default_factory=Surface)
    rules: Sequence[Rule] = RULES
    veto: Veto | None = None
    on_error: Literal["strike", "raise"] = "strike"

    def __post_init__(self) -> None:
        if self.on_error not in ("strike", "raise"):
            raise ValueError(f"on_error: expected 'strike' or 'raise', got {self.on_error!r}")
        object.__setattr__(self, "rules", tuple(self.rules))

    def judge(
        self,
        *,
        scaffold: str | None = None,
        solution: str | None = None,
        task: Mapping[str, Any] | None = None,
        calls: Sequence[Call] = (),
        parameters: Mapping[str, Any] | None = None,
    ) -> Verdict:
        """The verdict on a scaffold, or on a rollout under it; arguments as in `Attempt`."""
        attempt = Attempt(scaffold, solution, dict(task or {}), tuple(calls), dict(parameters or {}))
        reasons = tuple(reason for rule in self.rules for reason in _sentences(rule, self.surface, attempt))
        if not reasons and self.veto is not None:
            reasons = self._asked(attempt)
        return Verdict(bool(reasons), reasons)

    def _asked(self, attempt: Attempt) -> tuple[str, ...]:
        assert self.veto is not None
        try:
            reason = self.veto(attempt)
        except Exception as error:
            if self.on_error == "raise":
                raise
            return (f"the veto failed: {type(error).__name__}: {brief(str(error))}",)
        if reason is not None and not isinstance(reason, str):
            raise TypeError(f"veto: expected a sentence, or None to let pass, got {brief(reason)}")
        return () if reason is None else (f"vetoed: {reason}",)


def _sentences(rule: Rule, surface: Surface, attempt: Attempt) -> Iterable[str]:
    found = rule(surface, attempt)
    if isinstance(found, str):
        raise TypeError(f"{getattr(rule, '__name__', rule)}: expected sentences, got one text; yield it")
    return found


def _inside(path: Any) -> str | None:
    """The path within the workspace, normalized; None for anything that leaves it or is no path."""
    if not isinstance(path, str) or not path or "\0" in path or "\\" in path or path.startswith("/"):
        return None
    place = posixpath.normpath(path)
    return None if place.split("/")[0] == ".." else place


def _matches(place: str, patterns: Iterable[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(place, pattern) or place == pattern.rstrip("/") or _below(place, pattern)
        for pattern in patterns
    )


def _below(place: str, pattern: str) -> bool:
    return pattern.endswith("/") and fnmatch.fnmatchcase(place, f"{pattern}*")


def _touches(place: str, patterns: Sequence[str]) -> bool:
    """Whether writing `place` changes a file of the patterns: itself, or a folder on the way to it."""
    around = "" if place == "." else f"{place}/"
    return _matches(place, patterns) or any(pattern.startswith(around) for pattern in patterns)


def _named(surface: Surface, scaffold: str) -> Iterator[str]:
    """What a scaffold's text must not hold: a word that is a protected file, or more than its length."""
    folders = [pattern for pattern in (*surface.hidden, *surface.verifier) if pattern.endswith("/")]
    if len(scaffold) > surface.max_scaffold_length:
        yield f"scaffold: {len(scaffold)} characters, at most {surface.max_scaffold_length}"
    for word in dict.fromkeys(re.findall(r"[\w./\-]+", scaffold)):
        word = word.rstrip(".")  # of the sentence
        for place in (_inside(word), _inside(word.lstrip("./"))):
            if place is None or ("/" not in word and any(place == folder.rstrip("/") for folder in folders)):
                continue  # "tests" is a word before it is a folder
            visible = _matches(place, surface.readable) or not _matches(place, surface.verifier)
            if _matches(place, surface.hidden) or not visible:
                yield f"scaffold: names {brief(word)}, which is hidden or belongs to the verifier"
                break
