# berdiff-fast on a CPU:   docker build -t berdiff-fast .
#                          docker run --rm -v "$PWD:/data" berdiff-fast sample /data/ct.nii.gz --output /data/masks
# With CUDA kernels:       docker build -t berdiff-fast --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#                              --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN pip install --no-cache-dir torch --index-url ${TORCH_INDEX}
COPY . /src
RUN pip install --no-cache-dir "/src[imaging,figures,train]" && rm -rf /src
# Nobody's data is written as root.
USER ubuntu
WORKDIR /data
ENTRYPOINT ["berdiff-fast"]
