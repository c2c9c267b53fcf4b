"""Costs what its configuration says: fixed_ms for each execution and each_ms for each row of it, however the rows came together."""

import json
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.fixed_s, self.each_s = (float(parameters[name]["string_value"]) / 1000 for name in ("fixed_ms", "each_ms"))

    def execute(self, requests):
        until = time.monotonic() + self.fixed_s
        responses = []
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, "json").as_numpy()
            until += self.each_s * len(rows)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("json", rows)]))
        time.sleep(max(0.0, until - time.monotonic()))
        return responses
