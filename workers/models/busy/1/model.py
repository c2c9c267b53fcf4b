"""Holds a request for the given time, and lets go early when the caller has gone: for tests of cancellation and crash."""

import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from workers.model_io import InputError, decode, encode, need_between, refuse, respond

MAX_MS = 600_000
LOOK_EVERY_S = 0.005


class TritonPythonModel:
    def initialize(self, args):
        self.stopping = threading.Event()
        self.holds = set()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            raw = pb_utils.get_input_tensor_by_name(request, "json").as_numpy().reshape(-1)[0]
            try:
                ms = need_between(decode(raw), "ms", 0, MAX_MS)
            except InputError as error:
                sender.send(refuse(pb_utils, error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            hold = threading.Thread(target=self.hold, args=(sender, ms), daemon=True)
            self.holds = {thread for thread in self.holds if thread.is_alive()} | {hold}
            hold.start()

    def hold(self, sender, ms):
        until = time.monotonic() + ms / 1000
        cancelled = False
        while not cancelled and (left_s := until - time.monotonic()) > 0:
            cancelled = self.stopping.wait(min(left_s, LOOK_EVERY_S)) or sender.is_cancelled()
        body = np.array([encode({"ms": ms, "cancelled": cancelled})], dtype=np.object_)
        sender.send(respond(pb_utils, body), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        self.stopping.set()
        for hold in self.holds:
            hold.join()
