"""What a Dockerfile says, line by line: `parser.py` (instructions) and `lexer.py` (variables)."""
