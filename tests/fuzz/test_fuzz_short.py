"""The short form of tests/fuzz/run: the corpus, and the same few inputs made of it each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("h11")
pytest.importorskip("dns.message")
pytest.importorskip("hypothesis")

from tests.fuzz.engines import apply_edits, check_examples, replay
from tests.fuzz.target import CORPUS, Target, check_reader
from tests.fuzz.targets.registry import TARGETS

RUN = Path(__file__).with_name("run")
EXAMPLES = 100
"""Inputs of each target: all targets together take some ten seconds of processor time."""
CORPUS_BYTES = 4096
"""Of one target."""

targets = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@targets
def test_corpus_is_accepted_or_refused(target: Target) -> None:
    paths = sorted((CORPUS / target.name).iterdir())
    assert list(replay(target, paths)) == paths


@pytest.mark.many_inputs
@targets
def test_edited_corpus_is_accepted_or_refused(target: Target) -> None:
    with target.ready():
        check_examples(target, EXAMPLES, seed=0)


@targets
def test_corpus_is_small(target: Target) -> None:
    sizes = [len(seed) for seed in target.seeds().values()]
    assert 0 < sum(sizes) <= CORPUS_BYTES and max(sizes) <= target.longest


def test_every_corpus_has_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


def test_edits_replace_bytes_at_their_places() -> None:
    assert apply_edits(b"abcdef", [(1, 2, b"X"), (100, 0, b"Y")]) == b"aXdeYf"


def test_codec_that_reads_too_far_is_found() -> None:
    """The shared property tells a codec that takes a byte of what follows."""

    def read_greedy(stream):  # type: ignore[no-untyped-def]
        data = yield from stream.read_exactly(2)
        yield from stream.peek()
        return data

    with pytest.raises(AssertionError):
        check_reader(read_greedy, b"abc", 100)


def test_codec_that_depends_on_pieces_is_found() -> None:
    def read_piece(stream):  # type: ignore[no-untyped-def]
        return (yield from stream.read_some(10))

    with pytest.raises(AssertionError):
        check_reader(read_piece, b"abc", 100)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), *arguments], capture_output=True, text=True, timeout=120
    )


def test_program_lists_its_targets() -> None:
    done = run("list")
    assert (done.returncode, done.stdout.split()) == (0, list(TARGETS)), done.stderr


def test_program_fuzzes_a_target() -> None:
    done = run("socks4", "--engine", "hypothesis", "--seconds", "0.1")
    assert done.returncode == 0 and "no finding" in done.stdout, done.stderr


def test_program_tries_inputs_again() -> None:
    path = CORPUS / "socks4" / "connect"
    done = run("socks4", str(path))
    assert (done.returncode, done.stdout) == (0, f"{path}: passes\n"), done.stderr


def test_program_refuses_an_unknown_target() -> None:
    done = run("socks6", "--engine", "hypothesis")
    assert done.returncode == 2 and "no target 'socks6'" in done.stderr
