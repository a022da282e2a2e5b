"""The thread pool: every chunk runs once, tasks in order; idle threads sleep; a forked child has its own."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kernels.products import (
    Product,
    in_a_fresh_process,
    make_product,
    random_activations,
    run,
    same_bits,
)
from worker_orcd.kernels.cpu.library import Kind, Library, Op


@pytest.fixture(autouse=True)
def same_threads_afterwards(library: Library) -> Iterator[None]:
    threads = library.num_threads
    yield
    library.set_threads(threads)


@pytest.fixture
def product(library: Library) -> Product:
    """Small: a product takes less time than waking a thread."""
    return make_product(library, "Q4_0", 64, 64)


def chain(product: Product, x: np.ndarray, length: int) -> tuple[list[Op], np.ndarray]:
    """`length` products, each of the output before it, and the array of all outputs."""
    outs = np.zeros((length + 1, *x.shape), np.float32)
    outs[0] = x
    return [product.operation(outs[i], outs[i + 1], 8) for i in range(length)], outs


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_thousands_of_tiny_programs(library: Library, product: Product, threads: int) -> None:
    """Every product needs the whole of the one before: a chunk lost, doubled or early would show."""
    x = random_activations(np.random.default_rng(0), 10, 64)
    library.set_threads(1)
    operations, outs = chain(product, x, 12)
    assert run(library, operations, 10) == 0
    expected = outs.copy()
    library.set_threads(threads)
    for turn in range(1500):
        tokens, length = 1 + turn % 10, 1 + turn % 12
        outs[1:] = 0
        assert run(library, operations[:length], tokens) == 0
        assert same_bits(outs[: length + 1, :tokens].copy(), expected[: length + 1, :tokens].copy()), turn
        assert not outs[length + 1 :].any()
        assert not outs[1:, tokens:].any()


def test_the_number_of_threads_may_change(library: Library, product: Product) -> None:
    x = random_activations(np.random.default_rng(1), 9, 64)
    operations, outs = chain(product, x, 8)
    library.set_threads(1)
    assert run(library, operations, 9) == 0
    expected = outs.copy()
    for turn in range(400):
        assert library.set_threads(1 + turn * 7 % 5)
        assert library.num_threads == 1 + turn * 7 % 5
        outs[1:] = 0
        assert run(library, operations, 9) == 0
        assert same_bits(outs, expected)


def test_impossible_numbers_of_threads(library: Library) -> None:
    library.set_threads(2)
    for threads in (0, -1, 257, 1 << 20):
        assert not library.set_threads(threads)
    assert library.num_threads == 2


def test_long_programs(library: Library, product: Product) -> None:
    x = random_activations(np.random.default_rng(2), 1, 64) * np.float32(1e-3)
    library.set_threads(2)
    for length in (3, 3000):
        operations, outs = chain(product, x, 1)
        last = np.zeros_like(x)
        again = [product.operation(outs[0], last, 8)] * (length - 1)
        assert run(library, [*operations, *again], 1) == 0
        assert same_bits(outs[1], last)
    too_many = [product.operation(x, last, 8)] * 40000
    assert run(library, too_many, 1) < 0


def test_a_program_is_refused_as_a_whole(library: Library, product: Product) -> None:
    x = random_activations(np.random.default_rng(3), 2, 64)
    operations, outs = chain(product, x, 2)
    for bad in (Op(kind=0), Op(kind=99), Op(kind=Kind.LINEAR)):
        assert run(library, [*operations, bad], 2) < 0
        assert not outs[1:].any()
    assert run(library, operations, 2) == 0
    assert outs[2].any()


def test_callers_take_turns(library: Library, product: Product) -> None:
    """Two Python threads at once are against the rules, but do no harm."""
    library.set_threads(2)
    rng = np.random.default_rng(4)
    inputs = [random_activations(rng, 5, 64) for _ in range(3)]
    expected = [product(x, 8) for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(200):
            if not same_bits(product(inputs[index], 8), expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_growing_scratch_within_one_program(library: Library) -> None:
    """An operation's activations survive those of larger ones that are planned after it."""
    library.set_threads(2)
    rng = np.random.default_rng(5)
    products = [make_product(library, "Q4_0", 32, 64 << i) for i in range(5)]
    xs = [random_activations(rng, 12, product.k) for product in products]
    outs = [np.zeros((12, 32), np.float32) for _ in products]
    operations = [p.operation(x, out, 8) for p, x, out in zip(products, xs, outs, strict=True)]
    assert run(library, operations, 12) == 0
    for product, x, out in zip(products, xs, outs, strict=True):
        assert same_bits(out, product(x, 8))


WARM = """
    import os, sys, time
    import numpy as np
    from kernels.products import make_product, random_activations, same_bits
    from worker_orcd.kernels.cpu.build import load_library
    library = load_library()
    product = make_product(library, "Q4_0", 512, 256)
    x = random_activations(np.random.default_rng(0), 9, 256)
    library.set_threads(1)
    expected = product(x, 8)
    library.set_threads(4)
    assert same_bits(product(x, 8), expected)
"""


def with_four_warm_threads(body: str) -> str:
    return in_a_fresh_process(textwrap.dedent(WARM) + textwrap.dedent(body))


def test_a_forked_child_has_threads_of_its_own() -> None:
    """In the child only the forking thread exists: a pool that believed otherwise would hang."""
    said = with_four_warm_threads("""
        for _ in range(20):
            child = os.fork()
            if child == 0:
                good = all(same_bits(product(x, 8), expected) for _ in range(50))
                grandchild = os.fork()
                if grandchild == 0:
                    os._exit(0 if same_bits(product(x, 8), expected) else 1)
                good = good and os.waitpid(grandchild, 0)[1] == 0
                os._exit(0 if good else 1)
            assert same_bits(product(x, 8), expected)
            assert os.waitpid(child, 0)[1] == 0
        print("forked")
    """)
    assert said == "forked\n"


def test_idle_threads_sleep_and_wake() -> None:
    """On a busy machine it takes a while until each has had its turn, in which it goes to sleep."""
    said = with_four_warm_threads("""
        for _ in range(100):
            before = time.process_time()
            time.sleep(0.5)
            spent = time.process_time() - before
            if spent < 0.05:
                break
        print(spent)
        assert same_bits(product(x, 8), expected)
    """)
    assert float(said) < 0.05


def test_a_thread_put_aside_holds_nobody_up() -> None:
    """More threads than cores, and other processes that want them: all programs still end."""
    said = with_four_warm_threads("""
        import subprocess
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        try:
            library.set_threads(8)
            for _ in range(300):
                assert same_bits(product(x, 8), expected)
        finally:
            for process in busy:
                process.kill()
                process.wait()
        print("done")
    """)
    assert said == "done\n"
