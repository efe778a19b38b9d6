"""The command prg-serve, which says so where the gateway's packages are not installed."""

import sys

from entry.errors import PackageError, needs


def main() -> int:
    """Entry point."""
    try:
        with needs("serve"):
            from service.app import main as serve
    except PackageError as error:
        print(f"prg-serve: {error}", file=sys.stderr)
        return 1
    return serve()
