"""Takes as long as the file `service_ms` beside the repository says, one request at a time in each instance: a known capacity."""

import time
from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        # .../models/slow is the model's folder
        self.file = Path(args["model_repository"]).parents[1] / "service_ms"

    def execute(self, requests):
        responses = []
        for request in requests:
            until = time.monotonic() + float(self.file.read_text()) / 1000
            body = pb_utils.get_input_tensor_by_name(request, "json").as_numpy()
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("json", body)]))
            time.sleep(max(0.0, until - time.monotonic()))
        return responses
