# The offline scripts: docker run --gpus all -v "$PWD:/work" prg-trainer pretrain runs/mine --recipe images-64 --data photos
FROM python:3.11-slim
# For a machine without a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
WORKDIR /src
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir torch==2.13.0 --index-url "$TORCH_INDEX"
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY entry entry
COPY prg prg
COPY service service
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[train]'
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib
USER 65532:65532
WORKDIR /work
ENTRYPOINT ["prg"]
