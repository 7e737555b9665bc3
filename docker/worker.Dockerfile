# The data plane: the job worker (default) and the inference process, on CUDA.
# torch brings its own CUDA libraries; the base brings the driver's interface. Triton compiles a
# small launcher for each kernel at run time, so a C compiler and Python's headers are needed.
ARG CUDA=13.0.1-base-ubuntu24.04

FROM nvidia/cuda:${CUDA} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml README.md requirements.lock ./
# the CUDA build of torch insists on one version of triton, the CPU build that the lock pins on none
RUN grep -v '^triton==' requirements.lock > constraints.txt \
    && version=$(grep '^torch==' constraints.txt) \
    && /opt/venv/bin/pip install -c constraints.txt "$version"
COPY api ./api
COPY engine ./engine
COPY kernels ./kernels
COPY worker ./worker
COPY migrations ./migrations
# the package named kernels must stay out: transformers would load code with it
RUN /opt/venv/bin/pip install -c constraints.txt '.[engine,texts,eval]' \
    && ! /opt/venv/bin/pip show --quiet kernels 2>/dev/null

FROM nvidia/cuda:${CUDA}
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3.12 python3.12-dev \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 abq \
    && useradd --uid 10001 --gid abq --no-create-home --shell /usr/sbin/nologin abq \
    && install -d -o abq -g abq /var/lib/abq/data /var/lib/abq/artifacts /var/lib/abq/cache
COPY --from=build /opt/venv /opt/venv
COPY docker/worker_health.py /opt/abq/worker_health.py
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/abq/cache \
    HF_HOME=/var/lib/abq/cache/huggingface \
    TRITON_CACHE_DIR=/var/lib/abq/cache/triton \
    OMP_WAIT_POLICY=passive \
    ABQ_DATA_DIR=/var/lib/abq/data \
    ABQ_STORAGE__ROOT=/var/lib/abq/artifacts
WORKDIR /var/lib/abq
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "/opt/abq/worker_health.py"]
CMD ["python", "-m", "worker"]
