"""Lists, sorting, searching, graphs: exercises to learn from. Nothing here is run."""


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


def reverse_list(items: list[int]) -> list[int]:
    """Return a new list with the items in reverse order."""
    return items[::-1]


def flatten(nested: list) -> list:
    """Return all items of nested lists in one list."""
    flat = []
    for item in nested:
        if isinstance(item, list):
            flat.extend(flatten(item))
        else:
            flat.append(item)
    return flat


def selection_sort(items: list[int]) -> list[int]:
    """Sort items in place by choosing the smallest that is left."""
    for i in range(len(items)):
        smallest = i
        for j in range(i + 1, len(items)):
            if items[j] < items[smallest]:
                smallest = j
        items[i], items[smallest] = items[smallest], items[i]
    return items


def linear_search(items: list[int], target: int) -> int:
    """Return the index of target in items, or -1."""
    for i, item in enumerate(items):
        if item == target:
            return i
    return -1


def is_sorted(items: list[int]) -> bool:
    """Return whether items are in ascending order."""
    return all(items[i] <= items[i + 1] for i in range(len(items) - 1))


def merge(left: list[int], right: list[int]) -> list[int]:
    """Return the items of two sorted lists in order."""
    merged = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i])
            i += 1
        else:
            merged.append(right[j])
            j += 1
    return merged + left[i:] + right[j:]


def find_max(items: list[int]) -> int:
    """Return the largest of items."""
    largest = items[0]
    for item in items:
        if item > largest:
            largest = item
    return largest


def find_min(items: list[int]) -> int:
    """Return the smallest of items."""
    smallest = items[0]
    for item in items:
        if item < smallest:
            smallest = item
    return smallest


def second_largest(items: list[int]) -> int:
    """Return the second largest of items."""
    return sorted(set(items))[-2]


def sum_list(items: list[int]) -> int:
    """Return the sum of items."""
    total = 0
    for item in items:
        total += item
    return total


def two_sum(items: list[int], target: int) -> list[int]:
    """Return the indices of two items whose sum is target."""
    seen = {}
    for i, item in enumerate(items):
        if target - item in seen:
            return [seen[target - item], i]
        seen[item] = i
    return []


def remove_duplicates(items: list[int]) -> list[int]:
    """Return items without repetitions, in their order."""
    seen = set()
    result = []
    for item in items:
        if item not in seen:
            seen.add(item)
            result.append(item)
    return result


def chunks(items: list[int], size: int) -> Iterator[list[int]]:
    """Yield pieces of items of the given size."""
    for i in range(0, len(items), size):
        yield items[i : i + size]


def transpose(matrix: list[list[float]]) -> list[list[float]]:
    """Return the transpose of matrix."""
    return [list(row) for row in zip(*matrix)]


def matrix_multiply(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    """Return the product of the matrices a and b."""
    result = [[0] * len(b[0]) for _ in range(len(a))]
    for i in range(len(a)):
        for j in range(len(b[0])):
            for k in range(len(b)):
                result[i][j] += a[i][k] * b[k][j]
    return result


def dot(a: list[float], b: list[float]) -> float:
    """Return the dot product of a and b."""
    return sum(x * y for x, y in zip(a, b))


def rotate_list(items: list[int], k: int) -> list[int]:
    """Return items, rotated to the right by k places."""
    k %= len(items)
    return items[-k:] + items[:-k]


def max_subarray(items: list[int]) -> int:
    """Return the largest sum of neighbouring items."""
    best = current = items[0]
    for item in items[1:]:
        current = max(item, current + item)
        best = max(best, current)
    return best


def permutations(items: list[int]) -> list[list[int]]:
    """Return all orders of items."""
    if len(items) <= 1:
        return [items]
    result = []
    for i, item in enumerate(items):
        for rest in permutations(items[:i] + items[i + 1 :]):
            result.append([item] + rest)
    return result


def power_set(items: list[int]) -> list[list[int]]:
    """Return all subsets of items."""
    subsets = [[]]
    for item in items:
        subsets += [subset + [item] for subset in subsets]
    return subsets


def bfs(graph: dict[str, list[str]], start: str) -> list[str]:
    """Return the nodes of graph in the order of a breadth-first search."""
    visited = [start]
    queue = [start]
    while queue:
        node = queue.pop(0)
        for neighbour in graph[node]:
            if neighbour not in visited:
                visited.append(neighbour)
                queue.append(neighbour)
    return visited


def dfs(graph: dict[str, list[str]], node: str, visited: set[str]) -> None:
    """Visit the nodes of graph in the order of a depth-first search."""
    if node in visited:
        return
    visited.add(node)
    for neighbour in graph[node]:
        dfs(graph, neighbour, visited)


def dijkstra(graph: dict[str, dict[str, int]], start: str) -> dict[str, int]:
    """Return the shortest distances from start to all nodes of graph."""
    distances = {node: float("inf") for node in graph}
    distances[start] = 0
    queue = [(0, start)]
    while queue:
        distance, node = heapq.heappop(queue)
        if distance > distances[node]:
            continue
        for neighbour, weight in graph[node].items():
            new_distance = distance + weight
            if new_distance < distances[neighbour]:
                distances[neighbour] = new_distance
                heapq.heappush(queue, (new_distance, neighbour))
    return distances
