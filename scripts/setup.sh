# Sourced by demo.sh and test.sh: makes .venv unless a virtual environment is active or there already, and installs
# what setup.py asks for (with the extra named in $extra) unless exactly that was installed before.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    source .venv/bin/activate
fi
stamp="$VIRTUAL_ENV/.installed-${extra:-core}"
if ! cmp -s setup.py "$stamp"; then
    echo "Installing into $VIRTUAL_ENV (about two minutes, once) ..."
    python -m pip install --quiet --editable ".${extra:+[$extra]}"
    cp setup.py "$stamp"
fi
