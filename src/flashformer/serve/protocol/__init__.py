"""What clients say and what they hear: request bodies, checks, parsers, response bodies. No IO."""
