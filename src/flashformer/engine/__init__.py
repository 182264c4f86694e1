"""Tokens over time: requests in, tokens and text out, with the same bits at any batch."""
