r"""Strings made to hang, blow up or fool the reward, and what becomes of them.

    PYTHONPATH=.:kernels python tests/hostile_answers.py --count 10000

prints the results by kind of string, the time, and the largest memory of a worker and of this process. The strings
depend on the seed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sgpo.rewards.pool import RewardItem, RewardPool


def words(text: str) -> list[str]:
    return text.split()


GOLDS = [
    "5", r"\frac{1}{2}", "1, 2", "x^2+1", "(1,2)", "[2,5]", r"\text{east}", "x > 3", "8,221", r"10\%", r"3\sqrt{13}",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\{1\pm\sqrt{5},-2\}", r"x=\frac{\pi}{6}+\pi k",
]  # fmt: skip
GOOD = [
    r"\frac{1}{2}", "1, 2, 3", r"\left(1, \frac{\pi}{2}\right]", r"x \in [0, 1) \cup \{2\}", r"3\sqrt{13} \text{ cm}^2",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"2^{10} - 1", r"f(x) = x^2 + 1", r"\$1{,}000.50",
]  # fmt: skip
TOKENS = [
    " and ", " or ", "\n", *words(
        r"""\frac \sqrt \left( \right) \boxed{ { } ( ) [ ] ^ _ = < \le \pm \cup \in , ; 1 9 0 x y i e ! % $ & \\ \text{
        \sum \int \lim \begin{pmatrix} \end{pmatrix} \{ \} ... | ~ \overline{ \log \binom \cdot \% \to ' " # @
        \mathbb{R} \infty \pi \emptyset 1,000"""
    ),
]  # fmt: skip
TRAPS = [
    *words(
        r"""open('TRAP','w').write('x') os._exit(0) \input{/etc/passwd} \def\x{\x\x}\x 1/0 \frac{1}{0} \frac{0}{0} nan
        zoo
        \infty-\infty 1e999999 1e-999999 True None E S N Q I pi zeta beta gamma self x=y=z=1=2 x<y<z<1>2 5==5 x=x [1,2
        \{ % \% $ - + . , .. ,, \log_{1}5 \sin(10^{10^{9}}) \sqrt[10000000000]{2} \int_0^\infty{e^{-x^5}\sin(x^3)dx} inf
        __import__('os').system('touch${IFS}TRAP') \lim_{x\to0}\frac{\sin{x^{50}}}{x} (1,2]]"""
    ),
    "__import__('os').system('touch TRAP')", r"\text{__import__('os').system('touch TRAP')}", "lambda: 0", "import os",
    "exec('while 1: pass')", r"\write18{touch TRAP}", "0x" + "f" * 500, "5 = 5",
]  # fmt: skip


def towers(r: random.Random) -> str:
    base = r.choice(["9", "10", "2", "99", "x", "1.5", "(-3)", r"\pi"])
    style = r.choice(["{}^{{{}}}", "{}**{}", "({})^({})", "{}^{}", r"\left({}\right)^{{{}}}"])
    text = r.choice(["9", "99", "10^{10}", "99999999"])
    for _ in range(r.randint(1, 6)):
        text = style.format(base, text)
    return r.choice(["{}", "{}!", r"\sqrt{{{}}}", "-{}", r"\frac{{1}}{{{}}}", r"{} \bmod 7", "x = {}", "{}, 2"]).format(
        text
    )


def combinatorics(r: random.Random) -> str:
    n = 10 ** r.randint(2, 12)
    frames = [
        "N!", "(N!)!", r"\binom{N}{500}", r"\Gamma(N)", r"\zeta(N)", r"\sum_{k=1}^{N} k^k", r"\prod_{k=1}^{N} k",
        r"\frac{N!}{2!}", "F_{N}", "9" + "!" * r.randint(2, 30),
    ]  # fmt: skip
    return r.choice(frames).replace("N", str(n))


def nesting(r: random.Random) -> str:
    depth = r.choice([10, 50, 200, 1000, 5000])
    opening = r.choice(
        ["(", "{", r"\frac{1}{", r"\sqrt{", r"\left(", "-", "[", r"\{", r"\text{", "x^{", r"\boxed{", "|", "f("]
    )
    closing = {"(": r"\right)" if "left" in opening else ")", "{": "}", "[": "]", "|": "|", "-": ""}[opening[-1]]
    return opening * depth + "1" + closing * (depth - r.choice([0, 0, 1, depth]))


def unclosed(r: random.Random) -> str:
    good = r.choice(GOOD)
    cut = good[: r.randint(1, len(good))]
    return r.choice([cut, cut + "{" * r.randint(1, 50), "}" * r.randint(1, 50) + cut, cut * r.randint(2, 40)])


def huge(r: random.Random) -> str:
    size = r.choice([10_000, 100_000, 1_000_000])
    units = words(r"9 a { } \ 1, +1 x \boxed{ $ \frac <think> 1+ \text{and} (1,2), \pm1, 0. ^ é")
    unit = r.choice([*units, " ", "\n", "\\ ", " and ", r"\boxed 5 "])
    return unit * (size // len(unit))


def unicode_noise(r: random.Random) -> str:
    ranges = [(0, 0x20), (0x300, 0x36F), (0x660, 0x669), (0x200B, 0x202E), (0x1D400, 0x1D7FF), (0xFF10, 0xFF5E),
              (0x1F600, 0x1F64F), (0x4E00, 0x4E20), (0xE0000, 0xE007F), (0xD800, 0xDFFF)]  # fmt: skip
    text = "".join(chr(r.randint(*r.choice(ranges))) for _ in range(r.randint(1, 60)))
    return r.choice(["{}", "5{}", r"{}\frac12", r"\text{{{}}}", "1\0\0{}"]).format(text)


def traps(r: random.Random) -> str:
    return r.choice(TRAPS).replace("TRAP", TRAP_FILE)


def large(r: random.Random) -> str:
    """Not huge as a text, yet much for an algebra system."""
    n = r.randint(20, 200)
    return r.choice(
        [
            " + ".join(f"x^{{{k}}}" for k in range(n)) + " > 0",
            f"x^{{{10 ** r.randint(2, 9)}}} = 2",
            ", ".join(str(k) for k in range(20 * n)),
            r" \cup ".join(f"({k},{k + 1})" for k in range(n)),
            r"\begin{pmatrix}" + r" \\ ".join(" & ".join("x" * 9) for _ in range(n // 4)) + r"\end{pmatrix}",
            ", ".join([r"\pm 1"] * (n // 2)),
            r"\pm" * (n // 4) + "1",
            r"\sin" * n + "x",
            f"(x+y+z)^{{{20 * n}}}",
            "7" * (20 * n),
            "0." + "3" * (20 * n),
            r"0.\overline{" + "7" * (n // 2) + "}",
            "1,000" * n,
            "-" * n + "5",
        ]
    )


def soup(r: random.Random) -> str:
    return r.choice(["", " "]).join(r.choice(TOKENS) for _ in range(r.randint(3, 120)))


def mutated(r: random.Random) -> str:
    text = list(r.choice(GOOD))
    for _ in range(r.randint(1, 6)):
        at = r.randrange(len(text) + 1)
        text[at : at + r.randint(0, 2)] = r.choice([[], [r.choice(TOKENS)], text[at : at + 1] * 3])
    return "".join(text)


KINDS = {
    towers: 10, combinatorics: 6, nesting: 10, unclosed: 12, huge: 3, unicode_noise: 12, traps: 9, large: 8, soup: 15,
    mutated: 15,
}  # fmt: skip
TRAP_FILE = f"{tempfile.gettempdir()}/sgpo-hostile-trap-{os.getpid()}"
# Now and then a right answer with noise around it, such as many times `\\boxed 5`.
MAY_BE_RIGHT = {"mutated", "soup", "unclosed", "unicode_noise", "huge", "traps"}


def hostile(count: int, seed: int) -> Iterator[tuple[str, RewardItem]]:
    """(kind, item) of `count` hostile completions, most of them inside a box."""
    r = random.Random(seed)
    makers, weights = list(KINDS), list(KINDS.values())
    frames = [r"\boxed{%s}"] * 8 + [r"<think>%s</think>\boxed{6}", "%s", r"\boxed{6} \boxed %s", r"$$\boxed{%s}$$"]
    for _ in range(count):
        maker = r.choices(makers, weights)[0]
        text = maker(r)
        yield maker.__name__, RewardItem(r.choice(frames).replace("%s", text), r.choice(GOLDS))


def run(count: int, seed: int, *, timeout_s: float, memory_mib: int, workers: int = 2) -> dict:
    """Scores them and says what became of them; see the module."""
    Path(TRAP_FILE).unlink(missing_ok=True)
    kinds, items = zip(*hostile(count, seed), strict=True)
    with (
        RewardPool(workers=workers, timeout_s=timeout_s, memory_mib=memory_mib, max_chars=200_000) as pool,
        _PeakMemory() as peak,
    ):
        start = time.monotonic()
        results = [result for at in range(0, count, 500) for result in pool.score(items[at : at + 500])]
        elapsed_s = time.monotonic() - start
        still_works = pool.score([RewardItem(r"\boxed{\frac{2}{4}}", "0.5"), RewardItem(r"\boxed{7}", "8")])
    rewarded = [
        (kind, item.completion[:80], item.gold)
        for kind, item, result in zip(kinds, items, results, strict=True)
        if result.reward != 0
    ]
    return {
        "strings": count,
        "seconds": round(elapsed_s, 1),
        "statuses": dict(Counter(result.status for result in results)),
        "by_kind": {
            kind: dict(Counter(v.status for k, v in zip(kinds, results, strict=True) if k == kind))
            for kind in sorted(set(kinds))
        },
        "rewarded": rewarded,
        "trap_sprung": Path(TRAP_FILE).exists(),
        "works_afterwards": [result.reward for result in still_works] == [1.0, 0.0],
        "worker_peak_mib": peak.worker_mib,
        "own_growth_mib": peak.own_growth_mib,
    }


class _PeakMemory:
    """Largest resident memory of any one descendant that has come since, and how much this process's own peak has
    grown, in MiB."""

    def __enter__(self) -> _PeakMemory:
        self.worker_mib = self.own_growth_mib = 0
        self._before = set(_descendants(os.getpid()))
        self._own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.own_growth_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._own) // 1024

    def _watch(self) -> None:
        page = resource.getpagesize()
        while not self._stop.wait(0.05):
            for pid in set(_descendants(os.getpid())) - self._before:
                try:
                    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
                except OSError:
                    continue
                self.worker_mib = max(self.worker_mib, resident // 2**20)


def _descendants(pid: int) -> Iterator[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return
    for child in children:
        yield child
        yield from _descendants(child)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=1.0)
    parser.add_argument("--memory-mib", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result = run(arguments.count, arguments.seed, timeout_s=arguments.timeout_s, memory_mib=arguments.memory_mib)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
