# Stands in for the official image where there is no registry: Debian's nginx.
FROM python:3.11-slim
RUN apt-get -qq update && apt-get -qq install -y --no-install-recommends nginx-light > /dev/null
