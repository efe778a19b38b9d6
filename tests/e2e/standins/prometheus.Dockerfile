# Stands in for the official image where there is no registry: Debian's Prometheus.
FROM python:3.11-slim
RUN apt-get -qq update && apt-get -qq install -y --no-install-recommends prometheus > /dev/null
ENTRYPOINT ["/usr/bin/prometheus"]
