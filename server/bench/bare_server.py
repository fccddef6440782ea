"""The lower bound for every server in Python: uvicorn configured as ours, and an application that reads a body and
answers.

No routes, no checks, no queue, no thread: no application on uvicorn can cost less per request. Run by `bench overhead`:
`python -m server.bench.bare_server PORT`.
"""

from __future__ import annotations

import sys

import uvicorn
from starlette.types import Receive, Scope, Send

ANSWER = b'{"predictions":[[{"label":"class 0","index":0,"score":0.1}]]}'


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body", False):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        http="httptools",
        loop="uvloop",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
    )
