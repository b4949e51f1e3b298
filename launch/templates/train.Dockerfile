# An image for training. From a checkout, without what git ignores:
#   git archive HEAD | docker build -t REGISTRY/alpro-stream:0.1.0 -f launch/templates/train.Dockerfile -
FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="alpro-stream" \
      org.opencontainers.image.description="Trains ALPRO video-language models" \
      org.opencontainers.image.licenses="Apache-2.0"

# A compiler for torch.compile.
RUN apt-get update && apt-get install --no-install-recommends --yes gcc libc6-dev && rm -rf /var/lib/apt/lists/*

COPY . /opt/alpro-stream
# cuda13: DALI for the CUDA that torch brings; cuda12 for older ones.
RUN cd /opt/alpro-stream && pip install --no-cache-dir --constraint constraints.txt '.[cuda13]'

# A user with a home folder, as caches need one; a number, as Kubernetes checks `runAsNonRoot` by it.
RUN useradd --uid 1000 --create-home alpro
USER 1000
WORKDIR /home/alpro
