"""Returns its input: what a benchmark measures then is the path, not the model."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                output_tensors=[pb_utils.Tensor("json", pb_utils.get_input_tensor_by_name(request, "json").as_numpy())]
            )
            for request in requests
        ]
