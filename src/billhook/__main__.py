"""Entry point: the libraries take seconds to load, and Ctrl-C leaves cleanly meanwhile."""

import os
import signal
from typing import Any, NoReturn


def main() -> NoReturn:
    """Run the command line."""
    signal.signal(signal.SIGINT, _leave)  # an exception amid other people's imports could end anywhere
    from billhook import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _leave(*_: Any) -> NoReturn:
    os.write(2, b"billhook: interrupted; nothing half-written was left\n")
    os._exit(130)


if __name__ == "__main__":
    main()
