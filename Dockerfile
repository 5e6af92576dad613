# The image of a Ray cluster that runs nested-ats jobs (docs/cluster.md), for every pod: head, workers, submitter.
#
#   docker build -t nested-ats .
#   docker build -t nested-ats --build-arg PIP_INDEX_URL=... .    from another package index than pip's own setting
#   docker build -t nested-ats:cpu --build-arg TORCH_INDEX=... .  from an index of PyTorch builds without CUDA, much smaller
#
# The base is Python's own slim image, not rayproject/ray: that brings conda and gigabytes of pinned packages that this
# project does not use, and this one takes every version from constraints.txt, with which the tests run. No CUDA base
# is needed: PyTorch's usual wheels bring CUDA, and the node's container runtime brings the driver.
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim

# wget and bash are what KubeRay's probes and start commands call.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash ca-certificates wget \
    && rm -rf /var/lib/apt/lists/*

# As constraints.txt, and as rayVersion in `nested-ats job manifest kuberay`; a test compares them.
ARG RAY_VERSION=2.60.0
# Without a value pip takes the index that it is set to (in the base image's pip.conf, or its default).
ARG PIP_INDEX_URL
# Looked into for torch beside that one: a build named 2.13.0+cpu is preferred to 2.13.0.
ARG TORCH_INDEX

# Into /usr/local, not a virtual environment: KubeRay starts login shells, which reset PATH.
WORKDIR /opt/nested-ats
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch \
    && pip install --no-cache-dir --constraint constraints.txt "ray[default]==${RAY_VERSION}"
COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster/
COPY nested_ats nested_ats/
COPY pipeline pipeline/
COPY storage storage/
RUN pip install --no-cache-dir --constraint constraints.txt ".[cluster]"

# Pods run as this user; it owns nothing of the installation.
RUN useradd --uid 1000 --create-home --shell /bin/bash ats
USER 1000
WORKDIR /home/ats
ENV HOME=/home/ats PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
CMD ["nested-ats", "--help"]
