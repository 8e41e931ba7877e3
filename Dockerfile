# syntax=docker/dockerfile:1
# The project with its pinned packages: docker build -t swin_moe .  (docs/docker.md)
# With --build-arg DEVICE=cuda the CUDA kernels are compiled as well. The pinned torch brings CUDA's
# libraries in both cases, so that the machine needs only NVIDIA's driver and container toolkit.
ARG DEVICE=cpu
ARG UBUNTU_IMAGE=ubuntu:24.04
ARG CUDA_IMAGE=nvidia/cuda:13.2.1-devel-ubuntu24.04

FROM ${UBUNTU_IMAGE} AS tools-cpu
FROM ${CUDA_IMAGE} AS tools-cuda

# hadolint ignore=DL3006
FROM tools-${DEVICE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates g++ make python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/swin_moe
# Packages first: they change less often than the code, so this step stays cached.
COPY Makefile pyproject.toml ./
COPY requirements requirements
ENV UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1
RUN make packages
COPY . .
RUN make setup \
 && .venv/bin/python -m compileall -q swin_moe \
 && rm -rf build

FROM ${UBUNTU_IMAGE}
# g++ is for what DeepSpeed and Triton compile at first use.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates g++ python3 \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir -m 1777 /home/swin_moe
COPY --from=build /opt/swin_moe /opt/swin_moe
WORKDIR /opt/swin_moe
# Any user may write pictures and runs here and caches at home, but cannot change the code.
RUN mkdir -m 1777 -p runs \
 && chmod 1777 .
ENV PATH=/opt/swin_moe/.venv/bin:$PATH \
    HOME=/home/swin_moe \
    USER=swin_moe \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
CMD ["swin-moe", "--help"]
