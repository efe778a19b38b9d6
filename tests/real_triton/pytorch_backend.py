"""Stands in for Triton's libtorch backend, which the PyPI server lacks: runs an entry's own model.pt.

A Python-based backend of the name "pytorch", so that the entry is served as it is, its config.pbtxt unchanged.
Tensors travel by DLPack alone: this server's numpy bridge was built for numpy 1 and corrupts data under 2.
"""

import json
import os
import time

import torch
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One version of one model."""

    def initialize(self, args):
        torch.set_num_threads(1)
        self.config = json.loads(args["model_config"])
        path = os.path.join(args["model_repository"], args["model_version"], "model.pt")
        self.module = torch.jit.load(path).eval()
        # A file beside the entry makes the model slow: milliseconds, read at each batch.
        self.slow = os.path.join(args["model_repository"], "slow-ms")

    def execute(self, requests):
        if os.path.exists(self.slow):
            with open(self.slow) as file:
                time.sleep(int(file.read()) / 1000)
        inputs = [
            torch.cat(
                [
                    torch.from_dlpack(pb_utils.get_input_tensor_by_name(r, t["name"]).to_dlpack())
                    for r in requests
                ]
            )
            for t in self.config["input"]
        ]
        with torch.inference_mode():
            outputs = self.module(*inputs)
        responses = []
        row = 0
        for request in requests:
            wanted = set(request.requested_output_names())
            first = pb_utils.get_input_tensor_by_name(request, self.config["input"][0]["name"])
            count = first.shape()[0]
            tensors = [
                pb_utils.Tensor.from_dlpack(spec["name"], tensor[row : row + count].contiguous())
                for spec, tensor in zip(self.config["output"], outputs, strict=False)
                if spec["name"] in wanted
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
            row += count
        return responses
