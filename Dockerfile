# Pilotfish in a container. docs/docker.md explains how to build and run it.
#
#   docker build -t pilotfish .                                        for a host with an NVIDIA driver for CUDA 13
#   docker build -t pilotfish:cpu --build-arg BASE_IMAGE=debian:bookworm-slim --build-arg VARIANT=cpu \
#       --build-arg TORCH_INDEX_URL=<torch's index of CPU wheels> .    for a CPU
#
# BASE_IMAGE       any image of the Debian family with Python 3.11 or newer in its archive. torch brings CUDA's libraries
#                  in wheels, so a GPU needs of its base no more than NVIDIA's variables for the container toolkit.
# BUILD_IMAGE      what the wheels are built on: the same distribution as BASE_IMAGE. flash-attn 2 needs one with nvcc,
#                  such as nvidia/cuda:13.0.3-devel-ubuntu24.04.
# VARIANT          cuda or cpu: which build of torch must come out.
# TORCH_INDEX_URL  where torch comes from, if not from pip's own index.
# EXTRAS           extras of pyproject.toml to install, separated by spaces.
# CUDA_EXTRAS      further ones for VARIANT=cuda: flash-attn-4 and what it stands on. Empty for none.
# FLASH_ATTN_2     a requirement for flash-attn 2, such as flash-attn==2.8.3.post2, which is compiled here: for GPUs that
#                  flash-attn-4 does not know (compute capability 8.x and 12.x), which have Triton's attention without it.
# FLASH_ATTN_CUDA_ARCHS, MAX_JOBS, NVCC_THREADS
#                  for which GPUs, and how many files at once, with how many threads: several GB of memory for each.
#
# A build secret named "pip" is used as pip's configuration where it is given (a registry of your own, say).
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04
ARG BUILD_IMAGE=${BASE_IMAGE}

# ---- what the packages are installed and built with -----------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BUILD_IMAGE} AS build
# Versions are the distribution's: BASE_IMAGE decides on them. Each stage has its own caches, as buildah (1.28) holds the
# lock of one until the whole build has ended.
# hadolint ignore=DL3008
RUN --mount=type=cache,id=apt-archives-build,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,id=apt-lists-build,target=/var/lib/apt,sharing=locked \
    apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ libc6-dev python3-dev python3-venv
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/pilotfish
ENV PATH=/opt/pilotfish/bin:${PATH}

# What is to be installed, as lists: the layers below are made anew when these change, not whenever pyproject.toml does.
FROM build AS requirements
ARG EXTRAS="otel"
ARG CUDA_EXTRAS="cuda"
COPY pyproject.toml docker/requirements.py /requirements/
# Both are lists of words.
# hadolint ignore=SC2086
RUN python /requirements/requirements.py /requirements/pyproject.toml torch > /requirements/torch.txt \
    && python /requirements/requirements.py /requirements/pyproject.toml rest ${EXTRAS} > /requirements/rest.txt \
    && python /requirements/requirements.py /requirements/pyproject.toml extras ${CUDA_EXTRAS} > /requirements/cuda.txt

# ---- everything that Pilotfish needs, torch first -------------------------------------------------------------------
FROM build AS dependencies
ARG VARIANT=cuda
ARG TORCH_INDEX_URL=""
COPY docker/check_torch.py /requirements/
COPY --from=requirements /requirements/torch.txt /requirements/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} -r /requirements/torch.txt \
    && python /requirements/check_torch.py "${VARIANT}"
COPY --from=requirements /requirements/rest.txt /requirements/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip install -r /requirements/rest.txt
ARG FLASH_ATTN_2=""
ARG FLASH_ATTN_CUDA_ARCHS="80;90;120"
ARG MAX_JOBS=2
ARG NVCC_THREADS=2
# Built against the torch that is installed here, so without a build environment of its own. Its tools do not stay.
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    if [ "${VARIANT}" = cuda ] && [ -n "${FLASH_ATTN_2}" ]; then \
        if ! command -v nvcc; then \
            echo "FLASH_ATTN_2 is compiled, but BUILD_IMAGE has no nvcc: take an nvidia/cuda:13.0.3-devel image" >&2; \
            exit 1; \
        fi; \
        pip install ninja packaging setuptools wheel \
        && FLASH_ATTN_CUDA_ARCHS="${FLASH_ATTN_CUDA_ARCHS}" MAX_JOBS="${MAX_JOBS}" NVCC_THREADS="${NVCC_THREADS}" \
            pip wheel --no-build-isolation --no-deps --wheel-dir /wheels "${FLASH_ATTN_2}" \
        && pip install -r /requirements/torch.txt /wheels/*.whl \
        && pip uninstall -y ninja wheel; \
    fi
# flash-attn 2's wheel has an older flash_attn/cute than flash-attn-4, which is installed over it.
COPY --from=requirements /requirements/cuda.txt /requirements/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    if [ "${VARIANT}" = cuda ] && [ -s /requirements/cuda.txt ]; then \
        pip install -r /requirements/torch.txt -r /requirements/cuda.txt; \
    fi
# Headers of torch, which only extensions of it need (Triton has its own), and torch's own tests: 110 MB.
RUN rm -r /opt/pilotfish/lib/python3*/site-packages/torch/include \
    && find /opt/pilotfish/lib/python3*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete

# ---- Pilotfish itself, a wheel with its CPU kernels -----------------------------------------------------------------
FROM build AS package
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY pilotfish pilotfish
COPY engine engine
COPY server server
COPY text text
COPY tools tools
COPY checkpoints checkpoints
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels . \
    && python -m zipfile -l /wheels/*.whl > /wheels/content.txt \
    && grep '_native.*\.so' /wheels/content.txt

# ---- the image: no sources, and no compiler but the one with which Triton builds what launches its kernels ------------
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS server
ARG VARIANT=cuda
# hadolint ignore=DL3008
RUN --mount=type=cache,id=apt-archives-server,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,id=apt-lists-server,target=/var/lib/apt,sharing=locked \
    apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates python3 \
    && if [ "${VARIANT}" = cuda ]; then \
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev python3-dev; \
    fi \
    && useradd --system --uid 10001 --user-group --home-dir /var/lib/pilotfish --create-home pilotfish
COPY --from=dependencies /opt/pilotfish /opt/pilotfish
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    /opt/pilotfish/bin/python -m pip install --disable-pip-version-check --root-user-action=ignore --no-cache-dir \
        --no-index --no-deps /wheels/*.whl
COPY docker/healthcheck.py /opt/pilotfish/share/healthcheck.py

# Models that are downloaded, converted tokenizers, and kernels that are compiled at run time: Triton's are in its
# home's .triton, flash-attn-4's in PILOTFISH_CACHE. Not in /tmp, which may be noexec and does not last.
VOLUME /var/lib/pilotfish
ENV PATH=/opt/pilotfish/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/pilotfish \
    PILOTFISH_CACHE=/var/lib/pilotfish/cache \
    HF_HOME=/var/lib/pilotfish/huggingface \
    PILOTFISH_HOST=0.0.0.0
LABEL org.opencontainers.image.title="Pilotfish" \
      org.opencontainers.image.description="An OpenAI-compatible serving engine built around speculative decoding" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
WORKDIR /var/lib/pilotfish
EXPOSE 8000
STOPSIGNAL SIGTERM
# Loading counts as healthy, so this does not need to wait for it; readiness is /ready, for load balancers.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "/opt/pilotfish/share/healthcheck.py"]
# The exec form: the server is the process that SIGTERM reaches, and drains.
ENTRYPOINT ["pilotfish"]
CMD ["serve"]
