"""Chooses the agent's next action; the logic is in `workers.planning`, and for the agents of programs in `workers.conversing`."""

import triton_python_backend_utils as pb_utils

from workers.conversing import converse
from workers.model_io import answer_each
from workers.planning import plan


class TritonPythonModel:
    def execute(self, requests):
        return answer_each(pb_utils, requests, lambda body: converse(body) if "protocol" in body else plan(body))
