# CUDA image: docker build -t longsplash . ; docker run --gpus all -v $PWD/runs:/longsplash/runs longsplash make train
# torch's wheel brings CUDA, so that the base needs only Python and what Triton compiles its launchers with.
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ git libc6-dev make && rm -rf /var/lib/apt/lists/*
WORKDIR /longsplash
COPY requirements.txt Makefile ./
RUN make .venv/.installed
COPY . .
CMD ["make", "train"]
