# The model repository as a small image, which deploy/kubernetes copies beside Triton:
# docker build -t prg-models:0.1.0 -f docker/models.Dockerfile model_repository
FROM busybox:1.37
# 1000 is Triton's user: it can read files that were written for their owner alone.
COPY --chown=1000:1000 . /models
USER 1000:1000
