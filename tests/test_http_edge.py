"""The edge of the HTTP server by itself."""

import asyncio
import time

import pytest
from fastapi import HTTPException

from graftwork.serving.http.edge import Edge


@pytest.mark.parametrize("comes, status", [(True, 200), (False, 408)])
def test_a_body_that_came_while_the_server_stood_still_counts(comes, status):
    """The loop is blocked for longer than a body may take; it finds the body and the end of the time in the same turn."""
    sent = []

    async def app(scope, receive, send):
        try:
            assert (await receive())["body"] == b"{}"
        except HTTPException as error:
            return await send({"type": "http.response.start", "status": error.status_code})
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    async def main():
        there, loop = asyncio.Event(), asyncio.get_running_loop()

        async def receive():
            await there.wait()
            return {"type": "http.request", "body": b"{}", "more_body": False}

        def stall():
            time.sleep(0.1)
            if comes:
                loop.call_soon(there.set)

        loop.call_soon(stall)
        edge = Edge(app, max_body=100, body_seconds=0.05, answered=lambda route, status: None)
        await edge({"type": "http", "headers": [], "path": "/", "method": "POST"}, receive, send)

    asyncio.run(main())
    assert sent[0]["status"] == status
