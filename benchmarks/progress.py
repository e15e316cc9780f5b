"""A progress bar on stderr: tqdm's if it is installed, else one line that rewrites itself; none without a terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_CLEAR_LINE = "\r\033[K"


def progress(items: Sequence[T], title: str, label: Callable[[T], str]) -> Iterator[T]:
    """Yields the items and shows how many are done and which one runs."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _plain(items, title, label)
        return
    with tqdm(items, desc=title, unit="case", file=sys.stderr, disable=None, leave=False) as bar:
        for item in bar:
            bar.set_postfix_str(label(item))
            yield item


def _plain(items: Sequence[T], title: str, label: Callable[[T], str]) -> Iterator[T]:
    for done, item in enumerate(items):
        if sys.stderr.isatty():
            line = f"{_CLEAR_LINE}{title}: {done}/{len(items)} {label(item)}"
            print(line, end="", file=sys.stderr, flush=True)
        yield item
    if sys.stderr.isatty():
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Prints a line on stdout without breaking the bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{_CLEAR_LINE if sys.stderr.isatty() else ''}{text}", flush=True)
        return
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, flush=True)
