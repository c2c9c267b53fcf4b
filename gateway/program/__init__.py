"""Programs: what a run executes. A language (model, parse, check, expressions) and a pure engine that says what to do next."""
