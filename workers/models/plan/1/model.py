"""Chooses the agent's next action from the conversation so far; the logic is in `workers.planning`."""

import triton_python_backend_utils as pb_utils

from workers.model_io import answer_each
from workers.planning import plan


class TritonPythonModel:
    def execute(self, requests):
        return answer_each(pb_utils, requests, plan)
