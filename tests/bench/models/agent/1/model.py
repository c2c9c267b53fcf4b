"""An agent's model of known cost: it asks for the tool `linger` as often as its first message says, one call after the other, then answers.

Speaks `nearloop.agent/v1` (gateway/program/agent.py). An execution takes fixed_ms and each_ms for each row of it.
"""

import json
import time

import numpy as np
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
            thoughts = np.array([[think(json.loads(row[0]))] for row in rows], dtype=np.object_)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("json", thoughts)]))
        time.sleep(max(0.0, until - time.monotonic()))
        return responses


def think(body):
    if body["protocol"] != "nearloop.agent/v1":
        raise ValueError("this model speaks nearloop.agent/v1")
    task, *since = body["messages"]
    seen = [message for message in since if message["role"] == "tool"]
    if len(seen) < task["calls"]:
        call = {"id": f"call-{len(seen)}", "tool": "linger", "input": {"number": len(seen), "seconds": task["seconds"]}}
        return json.dumps({"calls": [call], "usage": {"tokens": 10}}).encode()
    return json.dumps({"answer": [message["output"]["number"] for message in seen], "usage": {"tokens": 10}}).encode()
