# The gateway: no compiler, no root; and no torch, unless TORCH_INDEX says where to get it (docker/gpu-lite.yml).
FROM python:3.11-slim AS build
ARG TORCH_INDEX=
WORKDIR /src
RUN python -m venv /venv \
    && if [ -n "$TORCH_INDEX" ]; then /venv/bin/pip install --no-cache-dir torch==2.13.0 --index-url "$TORCH_INDEX"; fi
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY entry entry
COPY prg prg
COPY service service
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[serve,otel]' \
    && /venv/bin/pip uninstall --yes --quiet pip setuptools

FROM python:3.11-slim
# Nothing is installed at run time, so nothing that installs is shipped.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3.11/site-packages/pip* \
    /usr/local/lib/python3.11/site-packages/setuptools* /usr/local/lib/python3.11/ensurepip
COPY --from=build /venv /venv
# Nothing is written: a read-only root is enough (docker run --read-only).
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    PRG_HOST=0.0.0.0 PRG_PORT=8000 PRG_ENGINE=triton PRG_TRITON_URL=triton:8001
USER 65532:65532
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/health/ready' % os.environ['PRG_PORT'], timeout=4)"]
ENTRYPOINT ["prg-serve"]
