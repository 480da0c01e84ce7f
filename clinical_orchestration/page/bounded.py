"""Blocking calls with a time limit, for an event loop that must never wait for a dead service."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Bounded(Generic[_T]):
    """A blocking function that answers within a limit, or raises ``TimeoutError``.

    Calls that come while one is under way share its answer, and so do calls within `fresh_seconds` after it began.
    A call that hangs therefore holds one thread, never one a request. The thread is a daemon: it keeps nobody from
    exiting.

    Args:
        function: what to call.
        limit_seconds: longest wait of a caller.
        fresh_seconds: how long an answer counts as new.
    """

    def __init__(self, function: Callable[[], _T], limit_seconds: float, fresh_seconds: float = 0.5) -> None:
        self._function = function
        self._limit = limit_seconds
        self._fresh = fresh_seconds
        self._lock = threading.Lock()
        self._future: Future[_T] | None = None
        self._before: Future[_T] | None = None
        self._began = -math.inf

    def _current(self) -> Future[_T]:
        with self._lock:
            if self._future is not None:
                busy = not self._future.done()
                if busy or time.monotonic() - self._began < self._fresh:
                    return self._future
                self._before = self._future
            future: Future[_T] = Future()
            self._future = future
            self._began = time.monotonic()
        threading.Thread(target=self._run, args=(future,), daemon=True, name="bounded").start()
        return future

    def _run(self, future: Future[_T]) -> None:
        try:
            future.set_result(self._function())
        except BaseException as error:
            future.set_exception(error)

    async def __call__(self) -> _T:
        """Return the answer.

        Raises:
            TimeoutError: there was none within the limit.
            Exception: what the function raised.
        """
        waiter = asyncio.wrap_future(self._current())
        done, _ = await asyncio.wait({waiter}, timeout=self._limit)
        if not done:
            # the shared call goes on; only this caller stops waiting
            raise TimeoutError(f"no answer within {self._limit:g} s")
        return waiter.result()

    async def anew(self) -> _T:
        """Return an answer to a call that begins now or later, however new the last one is; for after a change.

        Raises:
            TimeoutError: there was none within twice the limit.
            Exception: what the function raised.
        """
        if self._future is not None and not self._future.done():
            await asyncio.wait({asyncio.wrap_future(self._future)}, timeout=self._limit)
        with self._lock:
            self._began = -math.inf
        return await self()


class Background(Bounded[_T]):
    """A bounded call that nobody waits for but the first: others get the answer before, while a new one is made.

    No answer is older than the time between two calls and the limit together: once a new one is overdue, the old one
    is not given any more.
    """

    async def __call__(self) -> _T:
        """Return the newest answer there is.

        Raises:
            TimeoutError: there is none, and none came within the limit.
            Exception: what the function raised in the newest call that ended.
        """
        current = self._current()
        if current.done():
            return current.result()
        waited = time.monotonic() - self._began
        if self._before is not None and waited < self._limit:
            return self._before.result()
        if waited >= self._limit:
            raise TimeoutError(f"no answer within {self._limit:g} s")
        return await super().__call__()
