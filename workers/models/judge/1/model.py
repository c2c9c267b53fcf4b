"""Scores how far the evidence about a name answers the question; the logic is in `workers.judging`."""

import triton_python_backend_utils as pb_utils

from workers.judging import judge
from workers.model_io import answer_each


class TritonPythonModel:
    def execute(self, requests):
        return answer_each(pb_utils, requests, judge)
