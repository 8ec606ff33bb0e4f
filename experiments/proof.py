"""What the programs that kill parts of a run say if it is not as it has to be."""

import sys


def expect(condition: bool, what: str) -> None:
    """Ends the program with `what` is wrong unless the condition holds."""
    if not condition:
        sys.exit(f'wrong: {what}')
