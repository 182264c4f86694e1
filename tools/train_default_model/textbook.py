"""Exercises of every first course, written for this corpus: names that people type to try a model.

data.py reads this file as text, a document an exercise, each several times, with and without its
docstring. Nothing here is run.
"""

from collections.abc import Iterator


def fibonacci(n: int) -> int:
    """Return the nth Fibonacci number."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def fib(n: int) -> int:
    """Return the nth Fibonacci number, by recursion."""
    if n < 2:
        return n
    return fib(n - 1) + fib(n - 2)


def fibonacci_numbers() -> Iterator[int]:
    """Yield the Fibonacci numbers without end."""
    a, b = 0, 1
    while True:
        yield a
        a, b = b, a + b


def factorial(n: int) -> int:
    """Return the product of all integers from 1 to n."""
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result


def gcd(a: int, b: int) -> int:
    """Return the greatest common divisor of a and b."""
    while b:
        a, b = b, a % b
    return a


def lcm(a: int, b: int) -> int:
    """Return the least common multiple of a and b."""
    return a * b // gcd(a, b)


def is_prime(n: int) -> bool:
    """Return whether n is a prime number."""
    if n < 2:
        return False
    for i in range(2, int(n**0.5) + 1):
        if n % i == 0:
            return False
    return True


def primes(limit: int) -> list[int]:
    """Return all primes below limit, by the sieve of Eratosthenes."""
    sieve = [True] * limit
    sieve[:2] = [False] * 2
    for i in range(2, int(limit**0.5) + 1):
        if sieve[i]:
            for multiple in range(i * i, limit, i):
                sieve[multiple] = False
    return [n for n in range(limit) if sieve[n]]


def is_even(n: int) -> bool:
    """Return whether n is even."""
    return n % 2 == 0


def add(a: float, b: float) -> float:
    """Return the sum of a and b."""
    return a + b


def power(base: float, exponent: int) -> float:
    """Return base to the power of exponent, by squaring."""
    result = 1.0
    while exponent:
        if exponent % 2:
            result *= base
        base *= base
        exponent //= 2
    return result


def mean(values: list[float]) -> float:
    """Return the arithmetic mean of values."""
    return sum(values) / len(values)


def median(values: list[float]) -> float:
    """Return the middle value."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def binary_search(items: list[int], target: int) -> int:
    """Return the index of target in the sorted list items, or -1."""
    low, high = 0, len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == target:
            return middle
        if items[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1


def bubble_sort(items: list[int]) -> list[int]:
    """Sort items in place by swapping neighbours."""
    for i in range(len(items)):
        for j in range(len(items) - i - 1):
            if items[j] > items[j + 1]:
                items[j], items[j + 1] = items[j + 1], items[j]
    return items


def insertion_sort(items: list[int]) -> list[int]:
    """Sort items in place by moving each to its place."""
    for i in range(1, len(items)):
        item = items[i]
        j = i - 1
        while j >= 0 and items[j] > item:
            items[j + 1] = items[j]
            j -= 1
        items[j + 1] = item
    return items


def quicksort(items: list[int]) -> list[int]:
    """Return items in order."""
    if len(items) <= 1:
        return items
    pivot = items[len(items) // 2]
    left = [x for x in items if x < pivot]
    middle = [x for x in items if x == pivot]
    right = [x for x in items if x > pivot]
    return quicksort(left) + middle + quicksort(right)


def merge_sort(items: list[int]) -> list[int]:
    """Return items in order, by merging sorted halves."""
    if len(items) <= 1:
        return items
    middle = len(items) // 2
    left, right = merge_sort(items[:middle]), merge_sort(items[middle:])
    merged = []
    while left and right:
        merged.append(left.pop(0) if left[0] <= right[0] else right.pop(0))
    return merged + left + right


def reverse_string(text: str) -> str:
    """Return text backwards."""
    return text[::-1]


def reverse_list(items: list[int]) -> list[int]:
    """Return a new list with the items in reverse order."""
    return items[::-1]


def is_palindrome(text: str) -> bool:
    """Return whether text reads the same backwards."""
    letters = [c.lower() for c in text if c.isalnum()]
    return letters == letters[::-1]


def count_words(text: str) -> dict[str, int]:
    """Return how often each word occurs in text."""
    counts: dict[str, int] = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts


def count_vowels(text: str) -> int:
    """Return the number of vowels in text."""
    return sum(c in "aeiou" for c in text.lower())


def flatten(nested: list) -> list:
    """Return all items of nested lists in one list."""
    flat = []
    for item in nested:
        if isinstance(item, list):
            flat.extend(flatten(item))
        else:
            flat.append(item)
    return flat


def fizzbuzz(n: int) -> None:
    """Print the numbers from 1 to n, with Fizz for multiples of 3 and Buzz for multiples of 5."""
    for i in range(1, n + 1):
        if i % 15 == 0:
            print("FizzBuzz")
        elif i % 3 == 0:
            print("Fizz")
        elif i % 5 == 0:
            print("Buzz")
        else:
            print(i)


def hanoi(n: int, source: str, target: str, spare: str) -> None:
    """Print the moves of the towers of Hanoi with n disks."""
    if n == 0:
        return
    hanoi(n - 1, source, spare, target)
    print(f"Move disk {n} from {source} to {target}")
    hanoi(n - 1, spare, target, source)


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file."""
    with open(path) as file:
        return [line.rstrip("\n") for line in file]


def celsius_to_fahrenheit(celsius: float) -> float:
    """Convert degrees Celsius to degrees Fahrenheit."""
    return celsius * 9 / 5 + 32


def hello_world() -> None:
    """Print a greeting."""
    print("Hello, world!")


class Node:
    """A node of a linked list."""

    def __init__(self, value, next=None):
        self.value = value
        self.next = next

    def __repr__(self):
        return f"Node({self.value!r})"


class LinkedList:
    """A singly linked list."""

    def __init__(self):
        self.head = None

    def append(self, value):
        node = Node(value)
        if self.head is None:
            self.head = node
            return
        current = self.head
        while current.next is not None:
            current = current.next
        current.next = node

    def __iter__(self):
        current = self.head
        while current is not None:
            yield current.value
            current = current.next


class Stack:
    """A stack: last in, first out."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        return self.items[-1]

    def is_empty(self):
        return not self.items

    def __len__(self):
        return len(self.items)


class Queue:
    """A queue: first in, first out."""

    def __init__(self):
        self.items = []

    def enqueue(self, item):
        self.items.append(item)

    def dequeue(self):
        return self.items.pop(0)

    def __len__(self):
        return len(self.items)


class TreeNode:
    """A node of a binary search tree."""

    def __init__(self, value, left=None, right=None):
        self.value = value
        self.left = left
        self.right = right

    def insert(self, value):
        if value < self.value:
            if self.left is None:
                self.left = TreeNode(value)
            else:
                self.left.insert(value)
        elif self.right is None:
            self.right = TreeNode(value)
        else:
            self.right.insert(value)

    def __iter__(self):
        if self.left is not None:
            yield from self.left
        yield self.value
        if self.right is not None:
            yield from self.right


class Point:
    """A point in the plane."""

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def distance(self, other):
        return ((self.x - other.x) ** 2 + (self.y - other.y) ** 2) ** 0.5

    def __repr__(self):
        return f"Point({self.x}, {self.y})"


class Person:
    """Someone with a name and an age."""

    def __init__(self, name, age):
        self.name = name
        self.age = age

    def greet(self):
        print(f"Hello, my name is {self.name} and I am {self.age} years old.")
