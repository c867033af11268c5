# docker build --tag unet-diffusion .
# docker run --rm --user "$(id -u)" --volume "$PWD:/work" unet-diffusion fit --config digits
FROM python:3.13-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
# The compiler is for --model.speed fused. Debian removes old versions: to name one would break the build.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# PyTorch has a layer of its own, which a change of this package leaves as it is. With no address it is the build for
# CUDA, which runs on CPUs as well; the address of PyTorch's CPU index (pytorch.org/get-started) makes it a small one.
ARG TORCH_INDEX=
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[stream,text,wandb]" && mkdir --mode 777 /work

# Any user may run it: nothing is written but in /work and /tmp, and PyTorch asks for the user's name.
ENV HOME=/tmp USER=user
USER 1000
WORKDIR /work
ENTRYPOINT ["unet-diffusion"]
