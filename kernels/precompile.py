"""Compile Triton kernels before they are first launched, in parallel.

A kernel is compiled once for each set of types, alignments and constants that it is launched with, which only the
launch knows. So a `Precompiler` watches the launchers at work: inside `recording`, launches compile and do not run.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


class Precompiler:
    """Compiles what is launched inside `recording`, in threads, into Triton's caches in memory and on disk.

    Several processes of one machine can share the work: process `index` of `count` compiles every `count`-th kernel at
    once, and after `compile_own` of all of them reads the others' from the disk cache. All of them have to record the
    same launches.
    """

    def __init__(self, threads: int, index: int = 0, count: int = 1):
        from triton.runtime._async_compile import AsyncCompileMode

        self._share = _Share(threads, index, count)
        self._mode = AsyncCompileMode(self._share)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Every launch of any thread starts a compilation instead. Outputs of kernels keep what their memory held."""
        from triton.runtime._async_compile import active_mode
        from triton.runtime.jit import JITFunction

        launch = JITFunction.run

        def compile_only(kernel: Any, *arguments: Any, **options: Any) -> Any:
            # the mode is per thread, and autograd launches from another thread
            before = active_mode.set(self._mode)
            try:
                return launch(kernel, *arguments, **options | {"warmup": True})
            finally:
                active_mode.reset(before)

        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = launch

    def compile_own(self) -> None:
        """Wait until this process has compiled its share."""
        self._share.wait()

    def finish(self) -> int:
        """Compile the rest, or read it from the disk cache, and wait for it. Returns the number of kernels.

        Raises:
            Exception: what Triton raises if a kernel cannot be compiled.
        """
        self._share.start_rest()
        for kernel in self._mode.future_kernels.values():
            kernel.result()
        self._share.shutdown()
        return len(self._mode.future_kernels)


class _Share(Executor):
    """Runs every `count`-th task at once, and the others when they are asked for."""

    def __init__(self, threads: int, index: int, count: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="precompile")
        self._index, self._count, self._submitted = index % count, count, 0
        self._own: list[Future] = []
        self._rest: list[tuple[Future, Callable[..., Any]]] = []

    def submit(self, task: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future:
        assert not arguments
        assert not named
        number, self._submitted = self._submitted, self._submitted + 1
        if number % self._count == self._index:
            self._own.append(self._pool.submit(task))
            return self._own[-1]
        self._rest.append((Future(), task))
        return self._rest[-1][0]

    def wait(self) -> None:
        for future in self._own:
            future.exception()  # raised where the kernel is asked for

    def start_rest(self) -> None:
        for future, task in self._rest:
            self._pool.submit(_run_into, future, task)
        self._rest = []

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


def _run_into(future: Future, task: Callable[[], Any]) -> None:
    try:
        future.set_result(task())
    except BaseException as error:
        future.set_exception(error)
