# Sourced by iterate.sh and tests/run.sh: one virtual environment, .venv, made on the first run. Set PYTHON to use an
# environment of your own; then nothing is installed.

if [[ -n "${PYTHON:-}" ]]; then
    install() { :; }
else
    PYTHON=$PWD/.venv/bin/python

    # install FILE [pip arguments]: once for each content of FILE. The marker is written last, so an installation that
    # was cut off is done again.
    install() {
        local file=$1 marker
        shift
        marker=.venv/.installed-$(sha256sum "$file" | cut -c1-16)
        [[ ! -e $marker ]] || return 0
        if [[ ! -x .venv/bin/pip ]]; then
            echo "making .venv"
            python3 -m venv --clear .venv
        fi
        echo "installing $file into .venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" -r "$file"
        touch "$marker"
    }
fi
export PYTHON
