# The control plane: HTTP and state. It has no torch, and its code has no way to import it.
ARG PYTHON=3.12.12-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml README.md requirements.lock ./
COPY api ./api
COPY engine ./engine
COPY migrations ./migrations
RUN /opt/venv/bin/pip install -c requirements.lock . \
    && ! /opt/venv/bin/python -c "import torch" 2>/dev/null

FROM python:${PYTHON}
RUN groupadd --gid 10001 abq \
    && useradd --uid 10001 --gid abq --no-create-home --shell /usr/sbin/nologin abq \
    && install -d -o abq -g abq /var/lib/abq/data /var/lib/abq/artifacts
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/abq/data \
    ABQ_DATA_DIR=/var/lib/abq/data \
    ABQ_STORAGE__ROOT=/var/lib/abq/artifacts \
    ABQ_SERVER__HOST=0.0.0.0 \
    ABQ_SERVER__PORT=8000
WORKDIR /var/lib/abq
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["python", "-m", "api"]
