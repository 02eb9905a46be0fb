# The server on a CPU: docker compose up, then http://localhost:8000 with the token of compose.yaml.
FROM python:3.12-slim-bookworm

# Shared libraries that the mediapipe and OpenCV wheels link. Debian keeps no old versions that could be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libegl1 libgles2 libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin talker \
    && install -d -o talker -g talker /data

WORKDIR /opt/flowvqtalker
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
# PyTorch without CUDA, which is a tenth of the size.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt "torch==2.13.0+cpu" \
    && pip install --no-cache-dir -c constraints.txt ".[serve]"

USER 10001
# The root file system is read-only (compose.yaml); everything that is written lies in /data.
ENV HOME=/data XDG_CONFIG_HOME=/data/config TMPDIR=/data MPLCONFIGDIR=/data/config PYTHONDONTWRITEBYTECODE=1
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["flowvqtalker", "serve", "--host", "0.0.0.0", "--data", "/data"]
