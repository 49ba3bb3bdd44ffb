"""`docker` on PATH in tests: writes down what it is called with, and builds images of nothing.

The images are then those of the test's Engine (engine_server.py), at the socket in DOCKER_HOST.
"""

import http.client
import itertools
import json
import os
import socket
import sys
import urllib.parse
from collections.abc import Sequence


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(os.environ["DOCKER_HOST"].removeprefix("unix://"))


def main(words: Sequence[str]) -> int:
    with open(os.environ["STAND_IN_LOG"], "a", encoding="utf-8") as log:
        log.write(f"{json.dumps(['docker', *words])}\n")
    if "build" not in words:
        return 0
    given = dict(value.partition("=")[::2] for value in after(words, "--build-arg"))
    labels = json.dumps({"mainrun.sha": given.get("COMMIT", "")})  # as docker/Dockerfile does
    for tag in after(words, "--tag"):
        query = urllib.parse.urlencode({"t": tag, "labels": labels})
        connection = _Connection("docker")
        connection.request("POST", f"/build?{query}")
        answer = connection.getresponse()
        if answer.status != 200:
            sys.stderr.write(f"{json.loads(answer.read())['message']}\n")
            return 1
    print("Successfully built 0123456789ab")
    return 0


def after(words: Sequence[str], option: str) -> list[str]:
    """Values of an option: `--tag x` and `--tag=x`."""
    apart = [value for name, value in itertools.pairwise(words) if name == option]
    return apart + [w.partition("=")[2] for w in words if w.startswith(f"{option}=")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
