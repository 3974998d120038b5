"""How good is an answer: recall of retrieval, fact tracing, tail-patch."""
