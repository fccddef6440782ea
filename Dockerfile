# The service in one image: `serve` by default, `work` for a worker.
#
#     docker build -t lensrack:cpu .
#     docker build -t lensrack:cuda --build-arg VARIANT=cuda .
#     docker run --rm --read-only --tmpfs /tmp -v lensrack:/data -p 127.0.0.1:8000:8000 -e LENSRACK_ALLOW_OPEN=true lensrack:cpu
#
# The container writes only to /data (one volume) and /tmp. Packages come from where pip takes them, unless PIP_INDEX_URL
# and TORCH_INDEX name other indexes, or PIP_FIND_LINKS with PIP_NO_INDEX=1 a folder of wheels; torch without CUDA comes
# from PyTorch's index. Only the build stages know these settings. The image contains a
# list of its packages: docker run --rm --entrypoint cat lensrack:cpu /usr/local/share/sbom/lensrack.cdx.json

FROM python:3.11-slim-bookworm AS packages
ARG VARIANT=cpu
ARG TORCH_INDEX
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/venv && python -m venv /opt/pip
WORKDIR /build

# torch first: it is by far the largest package, and changes neither with our code nor with the other packages. The
# ordinary build includes CUDA; the build without CUDA has a separate index.
RUN case "$VARIANT" in \
      cpu) index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" ;; \
      cuda) index="${TORCH_INDEX:-}" ;; \
      *) echo "VARIANT: expected cpu or cuda, got $VARIANT" >&2; exit 2 ;; \
    esac \
 && /opt/pip/bin/pip --python /opt/venv/bin/python install ${index:+--index-url "$index"} 'torch>=2.11' 'torchvision>=0.26'

# Includes the extras for traces and gRPC, since nothing can be installed into the running image.
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; o = p['optional-dependencies']; \
print(*p['dependencies'], *o['server'], *o['otel'], *o['grpc'], sep='\n')" > requirements.txt \
 && /opt/pip/bin/pip --python /opt/venv/bin/python install -r requirements.txt

# Removes files that are only needed for compiling against the packages or testing them, about 150 MB of the CPU variant.
RUN cd /opt/venv/lib/python3*/site-packages \
 && rm -rf torch/include torch/share/cmake torch/test torch/bin/*test* torchvision/include pyarrow/include pyarrow/tests \
 && find . -name '*.a' -delete


# lensrack's own files are a separate layer, so that a new version changes only this layer.
FROM packages AS program
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
COPY README.md LICENSE ./
COPY client client
RUN /opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps --target /app .
COPY server /app/server
COPY prompts_store /app/prompts_store
RUN python -m compileall -q /app


# The list of the image's Python packages (CycloneDX). The tool that writes it stays in this stage.
FROM program AS inventory
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
RUN python -m venv /opt/inventory && /opt/inventory/bin/pip install 'cyclonedx-bom>=7.2,<8' \
 && PYTHONPATH=/app /opt/inventory/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
      --output-file /build/sbom.cdx.json /opt/venv/bin/python


FROM python:3.11-slim-bookworm
ARG VARIANT=cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="lensrack" \
      org.opencontainers.image.description="Train, publish and serve many vision tasks from one frozen backbone" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      lensrack.variant="$VARIANT" \
      lensrack.sbom="/usr/local/share/sbom/lensrack.cdx.json"

# A new volume inherits owner and mode of the folder that it is mounted on.
RUN groupadd --gid 10001 lensrack \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin lensrack \
 && install -d -o 10001 -g 10001 -m 750 /data \
 && install -d -o 10001 -g 10001 -m 755 /run/lensrack /run/lensrack-grafana \
 && install -d -o 10001 -g 10001 -m 750 /run/lensrack-keys

COPY --from=packages /opt/venv /opt/venv
COPY --from=program /app /app
COPY --from=inventory /build/sbom.cdx.json /usr/local/share/sbom/lensrack.cdx.json
WORKDIR /app
# The server listens on all addresses of the container; published ports decide who can reach it. Without API keys the
# server refuses to start unless LENSRACK_ALLOW_OPEN is set.
ENV PATH=/opt/venv/bin:/app/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/cache/hub \
    LENSRACK_HOME=/data \
    LENSRACK_HOST=0.0.0.0 \
    LENSRACK_PORT=8000
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['LENSRACK_PORT'] + '/healthz', timeout=4)"]
ENTRYPOINT ["python", "-m", "server"]
CMD ["serve"]
