"""Who does which tile when, and where every byte lies."""
