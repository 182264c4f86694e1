"""What a newcomer types, and how a model continues it: checkpoint -> texts, and how many run right.

`python everyday.py MODEL`: greedy, and sampled at temperature 0.8 with ten seeds. What a model
writes is run in a process of its own, with a check of its answers. Refining has shown most of this
to the model: it is measured what it learnt, not what it understands.
"""

import argparse
import json
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from flashformer import LLM, SamplingParams
from flashformer.serve.benchmark.provenance import provenance, system

MAX_TOKENS = 160
TIMEOUT_S = 5
CHECKED = {  # prompt -> what is true if the continuation is right
    "def fibonacci(n):": "[fibonacci(i) for i in range(8)] == [0, 1, 1, 2, 3, 5, 8, 13]",
    "def fib(n):": "[fib(i) for i in range(8)] == [0, 1, 1, 2, 3, 5, 8, 13]",
    "def factorial(n):": "[factorial(i) for i in range(6)] == [1, 1, 2, 6, 24, 120]",
    "def is_prime(n):": "[i for i in range(20) if is_prime(i)] == [2, 3, 5, 7, 11, 13, 17, 19]",
    "def is_prime(num):": "[i for i in range(20) if is_prime(i)] == [2, 3, 5, 7, 11, 13, 17, 19]",
    "def gcd(a, b):": "gcd(12, 18) == 6 and gcd(7, 5) == 1",
    "def add(a, b):": "add(2, 3) == 5",
    "def is_even(n):": "is_even(4) and not is_even(7)",
    "def reverse_string(s):": "reverse_string('abc') == 'cba'",
    "def is_palindrome(s):": "is_palindrome('level') and not is_palindrome('ab')",
    "def bubble_sort(arr):": "bubble_sort([3, 1, 2]) == [1, 2, 3]",
    "def quicksort(arr):": "quicksort([3, 1, 2, 1]) == [1, 1, 2, 3]",
    "def merge_sort(items):": "merge_sort([3, 1, 2, 1]) == [1, 1, 2, 3]",
    "def binary_search(arr, target):": "[binary_search([1, 3], x) for x in (3, 2)] == [1, -1]",
    "def count_words(text):": "count_words('a b a') == {'a': 2, 'b': 1}",
    "def flatten(nested):": "flatten([1, [2, [3]], 4]) == [1, 2, 3, 4]",
    "def celsius_to_fahrenheit(celsius):": "celsius_to_fahrenheit(100) == 212",
    "def max_subarray(nums):": "max_subarray([-2, 1, -3, 4, -1, 2, 1, -5, 4]) == 6",
    "class Stack:": "(lambda s: (s.push(1), s.push(2), s.pop()))(Stack())[2] == 2",
    "class Rectangle:": "Rectangle(2, 3).area() == 6",
}
OPEN = (  # read by a person
    "import os\nimport sys\n\n\ndef main():",
    "for i in range(10):",
    "with open('data.txt') as",
    "import numpy as np\n\nx = np.",
    "try:\n    import json\nexcept",
    "class TestMath(unittest.TestCase):",
    "The Python standard library",
    "A list comprehension is",
    "Hello",
    "def load_config(path):",
)


def continue_all(llm: LLM, prompts: list[str], params: SamplingParams) -> list[str]:
    """The prompts with what the model writes after them."""
    return [
        p + out.outputs[0].text
        for p, out in zip(prompts, llm.generate(prompts, params), strict=True)
    ]


def is_right(text: str, check: str) -> bool:
    """Whether the first definition of the text runs and the check holds after it."""
    first, *rest = text.split("\n")
    body = takewhile(lambda line: line[:1] in ("", " "), rest)
    code = "\n".join([first, *body, f"assert {check}"])
    command = [sys.executable, "-I", "-c", code]
    try:
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    with LLM(given.model) as llm:
        greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
        texts = continue_all(llm, [*CHECKED, *OPEN], greedy)
        samples = [
            continue_all(
                llm,
                list(CHECKED),
                SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, seed=seed),
            )
            for seed in range(given.seeds)
        ]
    rows = [
        {
            "prompt": prompt,
            "greedy": texts[i],
            "greedy_is_right": is_right(texts[i], check),
            "right_samples": sum(is_right(sample[i], check) for sample in samples),
        }
        for i, (prompt, check) in enumerate(CHECKED.items())
    ]
    report = {
        "kind": "everyday prompts",
        "prompts": len(rows),
        "samples_each": given.seeds,
        "right_greedy": sum(row["greedy_is_right"] for row in rows),
        "right_samples": sum(row["right_samples"] for row in rows),
        "checked": rows,
        "open": texts[len(rows) :],
        "machine": system(),
        **provenance(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
