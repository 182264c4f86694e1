"""Numbers: exercises to learn from. Nothing here is run."""


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


def celsius_to_fahrenheit(celsius: float) -> float:
    """Convert degrees Celsius to degrees Fahrenheit."""
    return celsius * 9 / 5 + 32


def recursive_factorial(n: int) -> int:
    """Return n factorial, by recursion."""
    if n <= 1:
        return 1
    return n * recursive_factorial(n - 1)


def is_odd(n: int) -> bool:
    """Return whether n is odd."""
    return n % 2 == 1


def subtract(a: float, b: float) -> float:
    """Return a minus b."""
    return a - b


def multiply(a: float, b: float) -> float:
    """Return the product of a and b."""
    return a * b


def divide(a: float, b: float) -> float:
    """Return a divided by b."""
    if b == 0:
        raise ValueError("cannot divide by zero")
    return a / b


def square(x: float) -> float:
    """Return the square of x."""
    return x * x


def cube(x: float) -> float:
    """Return the cube of x."""
    return x**3


def absolute(x: float) -> float:
    """Return the absolute value of x."""
    return x if x >= 0 else -x


def maximum(a: float, b: float) -> float:
    """Return the larger of a and b."""
    return a if a > b else b


def average(values: list[float]) -> float:
    """Return the average of values."""
    return sum(values) / len(values)


def variance(values: list[float]) -> float:
    """Return the variance of values."""
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / len(values)


def sum_of_digits(n: int) -> int:
    """Return the sum of the decimal digits of n."""
    total = 0
    while n > 0:
        total += n % 10
        n //= 10
    return total


def sum_of_squares(n: int) -> int:
    """Return the sum of the squares from 1 to n."""
    return sum(i * i for i in range(1, n + 1))


def divisors(n: int) -> list[int]:
    """Return all divisors of n."""
    return [i for i in range(1, n + 1) if n % i == 0]


def prime_factors(n: int) -> list[int]:
    """Return the prime factors of n in ascending order."""
    factors = []
    divisor = 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    if n > 1:
        factors.append(n)
    return factors


def is_perfect(n: int) -> bool:
    """Return whether n is the sum of its proper divisors."""
    return n > 1 and sum(i for i in range(1, n) if n % i == 0) == n


def collatz(n: int) -> list[int]:
    """Return the Collatz sequence that starts at n."""
    sequence = [n]
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        sequence.append(n)
    return sequence


def is_leap_year(year: int) -> bool:
    """Return whether year is a leap year."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def to_binary(n: int) -> str:
    """Return n in binary digits."""
    if n == 0:
        return "0"
    digits = ""
    while n > 0:
        digits = str(n % 2) + digits
        n //= 2
    return digits


def square_root(x: float) -> float:
    """Return the square root of x, by Newton's method."""
    guess = x / 2 or 1.0
    while abs(guess * guess - x) > 1e-9:
        guess = (guess + x / guess) / 2
    return guess


def area_of_circle(radius: float) -> float:
    """Return the area of a circle."""
    return math.pi * radius**2


def distance(x1: float, y1: float, x2: float, y2: float) -> float:
    """Return the distance between two points."""
    return math.sqrt((x2 - x1) ** 2 + (y2 - y1) ** 2)


def fahrenheit_to_celsius(fahrenheit: float) -> float:
    """Convert degrees Fahrenheit to degrees Celsius."""
    return (fahrenheit - 32) * 5 / 9


def pascal_triangle(n: int) -> list[list[int]]:
    """Return the first n rows of Pascal's triangle."""
    rows = []
    for i in range(n):
        row = [1] * (i + 1)
        for j in range(1, i):
            row[j] = rows[i - 1][j - 1] + rows[i - 1][j]
        rows.append(row)
    return rows


def clamp(x: float, low: float, high: float) -> float:
    """Return x, but at least low and at most high."""
    return max(low, min(x, high))
