# The image for pods and containers: vimscale, with the CUDA libraries of torch's own wheels, as an unprivileged user.
# docker build --tag REGISTRY/vimscale:0.1.0 . && docker push REGISTRY/vimscale:0.1.0
FROM python:3.11-slim-bookworm

# g++: Triton's launchers. verbs: NCCL on InfiniBand and RoCE. wget: KubeRay's probes
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ ibverbs-providers libibverbs1 wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[s3]' && rm -rf /src

# the user id that cluster manifests name
RUN useradd --uid 1000 --create-home vimscale
USER 1000
WORKDIR /home/vimscale
