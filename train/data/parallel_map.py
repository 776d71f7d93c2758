"""Work of several threads, in order and a few pieces ahead."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from train.runtime.setup import cores

TINY_BYTES = 4096  # encoded

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map` by threads; of the results at most two for each thread wait for being taken."""
    rest = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(function, piece) for piece in islice(rest, 2 * workers)]
        while waiting:
            result = waiting.pop(0).result()
            waiting += [pool.submit(function, piece) for piece in islice(rest, 1)]
            yield result


def decoder_threads(encoded_bytes: int) -> int:
    """How many threads decode images of such a size soonest."""
    # Threads that decode tiny images only wait for the interpreter's lock: two took 1.5 times as long as one.
    return 1 if encoded_bytes < TINY_BYTES else cores()
