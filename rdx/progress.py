"""A progress bar on the terminal for training and attacks."""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress


@contextlib.contextmanager
def bar(
    label: str, num_steps: int, *, first: int = 0, is_shown: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Shows a bar while its block runs, if standard error is a terminal.

    Args:
        label: the bar's name.
        num_steps: steps in all.
        first: steps that an earlier run has made.
        is_shown: whether to show it at all.

    Yields:
        `(done, status)`, to be called with the steps made and what else to tell; the speed is added.
    """
    if not is_shown:
        yield lambda *_: None
        return
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[status]}"), rich.progress.TimeRemainingColumn(),
    )
    started = time.monotonic()
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=num_steps, completed=first, status="compiling")

        def show(done: int, status: str) -> None:
            speed = (done - first) / (time.monotonic() - started)
            bars.update(task, completed=done, status=f"{status}{speed:.1f} steps/s")

        yield show
