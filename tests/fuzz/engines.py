"""The engines that make inputs: atheris, which sees what code an input reaches, or hypothesis.

Both begin with the corpus of a target and its words.  An engine raises what the target raises,
or ends the process with the input printed; it never judges by time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, NoReturn, Sequence

if TYPE_CHECKING:
    from hypothesis import strategies

    from tests.fuzz.target import Target

HANG_SECONDS = 30
"""Seconds after which atheris takes one input for a hang."""
MEMORY_MIB = 1024
"""Resident memory at which atheris takes an input for a leak."""
EXAMPLES = 500
"""Inputs between two looks at the clock."""
_EDITS = 6


# -- atheris


def run_atheris(target: Target, seconds: float, work: Path) -> NoReturn:
    """Fuzz for some seconds and end the process.  New inputs that reach new code go to `work`."""
    import atheris

    corpus, findings = work / "corpus" / target.name, work / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(exist_ok=True)
    words = work / f"{target.name}.dict"
    words.write_text("".join(map(_dictionary_line, target.words)))
    for name, seed in target.seeds().items():
        (corpus / name).write_bytes(seed)
    options = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-max_len={target.longest}",
        f"-dict={words}",
        f"-timeout={HANG_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={findings}/{target.name}-",
        "-print_final_stats=1",
    ]
    atheris.Setup(["run", *options, str(corpus)], target.check)
    with target.ready():
        atheris.Fuzz()
    raise SystemExit(0)


def _dictionary_line(word: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in word[:64]) + '"\n'


# -- hypothesis


def run_hypothesis(target: Target, seconds: float) -> int:
    """Fuzz for some seconds; return how many inputs were tried.  Raises what an input raises."""
    deadline = time.monotonic() + seconds
    tried = 0
    with target.ready():
        while time.monotonic() < deadline:
            check_examples(target, EXAMPLES, tried)
            tried += EXAMPLES
    return tried


def check_examples(target: Target, examples: int, seed: int) -> None:
    """Check inputs made of the corpus; the same ones for the same seed."""
    import hypothesis

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs(target))
    def check(data: bytes) -> None:
        target.check(data)

    check()


def inputs(target: Target) -> strategies.SearchStrategy[bytes]:
    """Return a strategy of inputs: those of the corpus with a few edits."""
    from hypothesis import strategies

    seeds = [*target.seeds().values(), b""]
    words = strategies.one_of(strategies.sampled_from(target.words), strategies.binary(max_size=8))
    place = strategies.integers(0, target.longest)
    edits = strategies.lists(
        strategies.tuples(place, strategies.integers(0, 4), words), max_size=_EDITS
    )
    edited = strategies.builds(apply_edits, strategies.sampled_from(seeds), edits)
    return edited.map(_Shortened(target.longest))


class _Shortened:
    """Cuts inputs at a target's limit."""

    def __init__(self, longest: int) -> None:
        self._longest = longest

    def __call__(self, data: bytes) -> bytes:
        return data[: self._longest]


def apply_edits(seed: bytes, edits: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Return a seed in which words were put at some places over some of its bytes."""
    data = seed
    for place, replaced, word in edits:
        at = place % (len(data) + 1)
        data = data[:at] + word + data[at + replaced :]
    return data


# -- both


def replay(target: Target, paths: Sequence[Path]) -> Iterator[Path]:
    """Check inputs from files, and yield each that passes."""
    with target.ready():
        for path in paths:
            target.check(path.read_bytes())
            yield path
