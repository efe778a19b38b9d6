# Stands in for NVIDIA's image where there is no registry: the real tritonserver of the PyPI wheel, which the test
# mounts at /site with torch, and tests/real_triton/pytorch_backend.py for the libtorch backend that the wheel lacks.
FROM python:3.11-slim
RUN apt-get -qq update && apt-get -qq install -y --no-install-recommends libpython3.11 libgomp1 > /dev/null
RUN python3 -m venv --without-pip /venv && echo /site > /venv/lib/python3.11/site-packages/mounted.pth
COPY pytorch_backend.py /backends/pytorch/model.py
COPY standins/tritonserver /usr/local/bin/tritonserver
ENV PATH=/venv/bin:$PATH LD_LIBRARY_PATH=/site/nvidia_pytriton.libs
