"""Asks the server in this container for /health; the exit status is 0 while it can be of use, and 1 when only a restart
helps. For the image's HEALTHCHECK, which so needs no curl in the image. It knows the port from PILOTFISH_PORT.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

SECONDS = 4


def main() -> int:
    url = f"http://127.0.0.1:{os.environ.get('PILOTFISH_PORT') or 8000}/health"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            print(answer.read().decode(errors="replace"))
            return 0
    except (urllib.error.URLError, OSError) as error:
        print(f"{url}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
