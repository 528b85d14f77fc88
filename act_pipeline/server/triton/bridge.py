"""A local socket on which Triton's process asks this one for the answers to its batches."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Union

from act_pipeline.server.items import Refused
from act_pipeline.server.service import Answer, Request
from act_pipeline.server.triton.tensors import Returned, Sent, request_of, returned, threshold_of

_logger = logging.getLogger(__name__)
AnswerBatch = Callable[[Sequence[Request]], Sequence[Union[Answer, Refused]]]


class Bridge:
    """The socket; each instance of Triton's model has a connection and a thread."""

    def __init__(self, folder: Path, answer: AnswerBatch) -> None:
        """Listen.

        Args:
            folder: where the socket is made; only this user may enter it.
            answer: answers the requests of a batch; called in several threads.
        """
        self.key = secrets.token_bytes(32)
        self.address = str(folder / "bridge.sock")
        self._answer = answer
        self._listener = Listener(self.address, "AF_UNIX", backlog=64, authkey=self.key)
        self._closed = False
        threading.Thread(target=self._accept, name="bridge", daemon=True).start()

    def close(self) -> None:
        """Stop listening; the connections end with Triton's process."""
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        from multiprocessing import AuthenticationError

        while not self._closed:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError):
                if self._closed:
                    return
                continue
            threading.Thread(target=self._serve, args=(connection,), name="batches", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        while True:
            try:
                connection.send(self.answers(connection.recv()))
            except (EOFError, OSError):
                connection.close()
                return

    def answers(self, batch: Sequence[Sent]) -> list[Returned]:
        """Return the answers to a batch of Triton's requests."""
        read = [request_of(sent) for sent in batch]
        places = [place for place, request in enumerate(read) if isinstance(request, Request)]
        try:
            found = list(self._answer([request for request in read if isinstance(request, Request)])) if places else []
        except Exception as error:  # a bug of ours must not end the connection, nor wait forever in the client
            _logger.exception("a batch is not answered")
            found = [Refused(f"internal error: {type(error).__name__}", by_client=False)] * len(places)
        by_place = dict(zip(places, found))
        results: list[Returned] = []
        for place, (sent, request) in enumerate(zip(batch, read)):
            answer = request if isinstance(request, Refused) else by_place[place]
            results.append(returned(answer, threshold_of(sent)))
        return results
