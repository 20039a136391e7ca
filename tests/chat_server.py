"""A chat-completions server on 127.0.0.1 that misbehaves by plan, for the tests.

Everything it does follows from the request's body and from how often it came before, so that two runs that ask the same
are answered the same, whatever the order. `prompt_tokens` of an answer is a number that only this body has: it says in
a client's files which request an answer belongs to.
"""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "429 with Retry-After", "500", "cut", "reset", "broken JSON", "no choices", "slow", "trickle")


def number_of(body: bytes) -> int:
    return int.from_bytes(hashlib.sha256(body).digest()[:5], "big")


class ChatServer:
    """Serves from a thread until `close`; a context manager.

    Args:
        reply: the text that answers a body.
        faults: share of requests that meet one of FAULTS; a body meets at most three.
        delay_s: before each answer.
        slow_s: how long a "slow" or "trickle" request takes; the client's time-out must be shorter.
        status: answer everything with this status instead.
    """

    def __init__(
        self,
        reply: Callable[[dict[str, Any], random.Random], str],
        *,
        faults: float = 0.0,
        delay_s: float = 0.0,
        slow_s: float = 1.0,
        status: int | None = None,
        retry_after: str = "0.05",
        only: tuple[str, ...] = FAULTS,
    ) -> None:
        self.reply, self.faults, self.delay_s, self.slow_s = reply, faults, delay_s, slow_s
        self.status, self.retry_after, self.only = status, retry_after, only
        self.seen: Counter[int] = Counter()
        self.log: list[tuple[int, str]] = []
        self.started: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.now = self.most_at_once = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that hang up are expected
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def outcomes(self) -> Counter[str]:
        return Counter(outcome for _, outcome in self.log)

    def fault(self, number: int, tried: int, request: dict[str, Any]) -> str:
        dice = random.Random(f"{number} {tried}")
        return dice.choice(self.only) if tried < 3 and dice.random() < self.faults else ""


def _handler(chat: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two writes

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send(chat.status or 200, b'{"data": []}')

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            number, request = number_of(body), json.loads(body)
            with chat.lock:
                fault = f"{chat.status}" if chat.status else chat.fault(number, chat.seen[number], request)
                chat.seen[number] += 1
                chat.log.append((number, fault or "answered"))
                chat.started.append(time.monotonic())
                chat.headers.append(dict(self.headers))
                chat.bodies.append(request)
                chat.now += 1
                chat.most_at_once = max(chat.most_at_once, chat.now)
            try:
                time.sleep(chat.delay_s)
                self.answer(fault, request, number)
            finally:
                with chat.lock:
                    chat.now -= 1

        def answer(self, fault: str, request: dict[str, Any], number: int) -> None:
            text = chat.reply(request, random.Random(number))
            content = json.dumps(
                {
                    "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": number, "completion_tokens": len(text)},
                }
            ).encode()
            if fault == "reset":
                self.close_connection = True
                self.connection.close()
            elif fault == "cut":
                self.send(200, content[: len(content) // 2], length=len(content))
                self.close_connection = True
            elif fault == "broken JSON":
                self.send(200, content[:-5])
            elif fault == "no choices":
                self.send(200, b'{"choices": []}')
            elif fault == "slow":
                time.sleep(chat.slow_s)
                self.send(200, content)
            elif fault == "trickle":
                self.send(200, b"", length=len(content))
                for byte in content[:-1]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(chat.slow_s / len(content))
                self.close_connection = True
            elif fault == "429 with Retry-After":
                self.send(429, b"{}", **{"Retry-After": chat.retry_after})
            elif fault:
                self.send(int(fault[:3]), b'{"error": {"message": "not today"}}')
            else:
                self.send(200, content)

        def send(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(content)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    return Handler
