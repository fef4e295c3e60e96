"""Joins the datagrams of one batch into runs: same way, same length, in order.

A run leaves in one system call where the kernel can cut it.  Order within a
flow is the order of arrival, always: what does not fit a flow's run sends that
run first.  One object a batch, used by the thread that received it.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

from netproxy.interfaces.datagrams import Run
from netproxy.net.datagram import SEGMENTED_BYTES, SEGMENTS_LIMIT


class Runs:
    """`send(key, run)` is called for each finished run; keys are whatever the caller sends to."""

    __slots__ = ("_send", "_runs", "_key", "_length", "_append")

    def __init__(self, send: Callable[[Any, Run], None]) -> None:
        self._send = send
        self._runs: dict[Any, Run] = {}
        # the run that the last datagram was added to, while datagrams of that length may follow
        self._key: Any = None
        self._length = -1
        self._append: Any = None

    def add(self, key: Any, offsets: Sequence[int], length: int, last: int, skip: int = 0) -> None:
        """A span's datagrams, the first `skip` bytes of each left out; `last` may not be under it."""
        if len(offsets) > 1:
            self._add_train(key, offsets, length, last, skip)
        elif length == self._length and key is self._key:
            self._append(offsets[0] + skip)
        else:
            self._add_single(key, offsets[0] + skip, length - skip)
            self._length = length

    def _add_single(self, key: Any, offset: int, size: int) -> None:
        run = self._runs.get(key)
        if run is not None and run.last == run.length >= size > 0:
            _extend(run, (offset,), size)
        else:
            if run is not None:
                self._send(key, run)
            run = self._runs[key] = Run([offset], size, size)
        if run.length == size:
            self._key, self._append = key, run.offsets.append
        else:
            self._key = None  # a shorter one ends its run

    def _add_train(self, key: Any, offsets: range, length: int, last: int, skip: int) -> None:
        """Many that came together: a run of their own, or the rest of one, as far as a send takes them."""
        self._key = None
        offsets = range(offsets.start + skip, offsets.stop + skip, offsets.step)
        size, left = length - skip, last - skip
        run = self._runs.get(key)
        fits = left > 0 or last == length  # else nothing is left of the last: no train can carry it
        if run is not None:
            if (
                fits
                and run.last == run.length == size > 0
                and _one_send(len(run.offsets) + len(offsets), size)
            ):
                _extend(run, offsets, left)
                return
            self._send(key, run)
        if fits:
            self._runs[key] = Run(offsets, size, left)
        else:
            self._send(key, Run(offsets[:-1], size, size))
            self._runs[key] = Run([offsets[-1]], 0, 0)

    def flush(self) -> None:
        for key, run in self._runs.items():
            self._send(key, run)
        self._runs.clear()
        self._key = None


def _extend(run: Run, offsets: Sequence[int], last: int) -> None:
    if type(run.offsets) is not list:
        run.offsets = list(run.offsets)
    run.offsets.extend(offsets)
    run.last = last


def _one_send(count: int, length: int) -> bool:
    """Whether joining them saves a send; headers, which come on top, are left to the send itself."""
    return count <= SEGMENTS_LIMIT and count * length <= SEGMENTED_BYTES
