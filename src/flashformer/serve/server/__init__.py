"""The HTTP server: an engine in its own process behind an OpenAI- and Anthropic-compatible API."""
