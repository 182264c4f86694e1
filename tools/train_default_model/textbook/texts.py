"""Words, files, and programs that talk: exercises to learn from. Nothing here is run."""


def reverse_string(text: str) -> str:
    """Return text backwards."""
    return text[::-1]


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


def hello_world() -> None:
    """Print a greeting."""
    print("Hello, world!")


def is_anagram(a: str, b: str) -> bool:
    """Return whether a and b have the same letters."""
    return sorted(a.lower()) == sorted(b.lower())


def count_characters(text: str) -> dict[str, int]:
    """Return how often each character occurs in text."""
    counts = {}
    for character in text:
        counts[character] = counts.get(character, 0) + 1
    return counts


def capitalize_words(text: str) -> str:
    """Return text with every word capitalized."""
    return " ".join(word.capitalize() for word in text.split())


def reverse_words(text: str) -> str:
    """Return the words of text in reverse order."""
    return " ".join(reversed(text.split()))


def longest_word(text: str) -> str:
    """Return the longest word of text."""
    return max(text.split(), key=len)


def remove_vowels(text: str) -> str:
    """Return text without its vowels."""
    return "".join(c for c in text if c.lower() not in "aeiou")


def caesar_cipher(text: str, shift: int) -> str:
    """Return text with every letter shifted in the alphabet."""
    result = ""
    for c in text:
        if c.isalpha():
            start = ord("A") if c.isupper() else ord("a")
            result += chr((ord(c) - start + shift) % 26 + start)
        else:
            result += c
    return result


def is_balanced(text: str) -> bool:
    """Return whether all brackets of text are closed in the right order."""
    pairs = {")": "(", "]": "[", "}": "{"}
    stack = []
    for c in text:
        if c in "([{":
            stack.append(c)
        elif c in pairs:
            if not stack or stack.pop() != pairs[c]:
                return False
    return not stack


def levenshtein(a: str, b: str) -> int:
    """Return the edit distance between a and b."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            cost = 0 if x == y else 1
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + cost))
        previous = current
    return previous[-1]


def greet(name: str) -> str:
    """Return a greeting for name."""
    return f"Hello, {name}!"


def say_hello(name: str) -> None:
    """Print a greeting for name."""
    print(f"Hello, {name}!")


def read_file(path: str) -> str:
    """Return the content of a text file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def write_file(path: str, text: str) -> None:
    """Write text into a file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def read_json(path: str) -> dict:
    """Return the content of a JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, data: dict) -> None:
    """Write data into a JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=4)


def read_csv(path: str) -> list[dict]:
    """Return the rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def count_lines(path: str) -> int:
    """Return the number of lines of a file."""
    with open(path) as file:
        return sum(1 for line in file)


def print_table(n: int) -> None:
    """Print the multiplication table of n."""
    for i in range(1, 11):
        print(f"{n} x {i} = {n * i}")


def guess_number() -> None:
    """Let the user guess a number between 1 and 100."""
    secret = random.randint(1, 100)
    while True:
        guess = int(input("Guess a number: "))
        if guess < secret:
            print("Too low!")
        elif guess > secret:
            print("Too high!")
        else:
            print("You guessed it!")
            break


def timer(function: Callable) -> Callable:
    """Print how long a function takes."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = time.time()
        result = function(*args, **kwargs)
        print(f"{function.__name__} took {time.time() - start:.3f} seconds")
        return result

    return wrapper


def memoize(function: Callable) -> Callable:
    """Remember the results of a function."""
    cache = {}

    @functools.wraps(function)
    def wrapper(*args):
        if args not in cache:
            cache[args] = function(*args)
        return cache[args]

    return wrapper


def main() -> None:
    """Read the arguments and greet."""
    parser = argparse.ArgumentParser(description="Greet someone.")
    parser.add_argument("name", help="who is greeted")
    args = parser.parse_args()
    print(f"Hello, {args.name}!")
