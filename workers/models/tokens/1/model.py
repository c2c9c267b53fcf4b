"""Streams the words of a text one response at a time, and stops when the caller has gone."""

import threading

import numpy as np
import triton_python_backend_utils as pb_utils

from workers.model_io import InputError, decode, encode, need, need_between, refuse, respond

MAX_DELAY_MS = 60_000


class TritonPythonModel:
    def initialize(self, args):
        self.stopping = threading.Event()
        self.streams = set()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            raw = pb_utils.get_input_tensor_by_name(request, "json").as_numpy().reshape(-1)[0]
            try:
                body = decode(raw)
                words = need(body, "text", str).split()
                delay_ms = need_between({"delay_ms": 0} | body, "delay_ms", 0, MAX_DELAY_MS)
            except InputError as error:
                sender.send(refuse(pb_utils, error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            # A thread for each stream: streams go on side by side while the model takes new requests.
            stream = threading.Thread(target=self.stream, args=(sender, words, delay_ms / 1000), daemon=True)
            self.streams = {thread for thread in self.streams if thread.is_alive()} | {stream}
            stream.start()

    def stream(self, sender, words, delay_s):
        for word in words:
            if sender.is_cancelled() or self.stopping.wait(delay_s):
                break
            sender.send(respond(pb_utils, np.array([encode({"token": word})], dtype=np.object_)))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        self.stopping.set()
        for stream in self.streams:
            stream.join()
