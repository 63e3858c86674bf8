# The image of a run: docker build --tag IMAGE .          a CPU: demos, data, porting, talking
#                     --build-arg ACCELERATOR=tpu         a TPU; jax[tpu] of one version names its libtpu
#                     --build-arg ACCELERATOR=cuda12      an NVIDIA GPU (or cuda13)
#   docker run --rm --volume "$PWD:/run/zephyr" IMAGE demo --short
FROM python:3.11-slim
ARG ACCELERATOR=""
ARG JAX=0.10.2
# gcsfs is for gs:// paths
RUN pip install --no-cache-dir "jax${ACCELERATOR:+[$ACCELERATOR]}==$JAX" "gcsfs>=2025"
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY zephyr_jax zephyr_jax
COPY configs configs
# what was copied has its version
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "."
# stays root: TPU containers are privileged, and mounted folders belong to whoever starts them
WORKDIR /run/zephyr
ENTRYPOINT ["python", "-m", "zephyr_jax"]
CMD ["--help"]
