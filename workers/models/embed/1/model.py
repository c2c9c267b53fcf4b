"""384-dimensional lexical embeddings of unit length; the mathematics is in `workers.lexical`."""

import triton_python_backend_utils as pb_utils

from workers.lexical import embed


class TritonPythonModel:
    def execute(self, requests):
        rows = [pb_utils.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1) for request in requests]
        # One call for the whole dynamic batch, then cut apart again.
        vectors = embed([raw.decode("utf-8", "replace") for texts in rows for raw in texts])
        responses, start = [], 0
        for texts in rows:
            tensor = pb_utils.Tensor("embedding", vectors[start : start + len(texts)])
            responses.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
            start += len(texts)
        return responses
