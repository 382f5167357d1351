# Run the program with the arguments behind the first, which is Python.
python=$1
shift
case $python in "~/"*) python=$HOME/${python#"~/"} ;; esac
enter
[ ! -e .llmtrain/env ] || { set -a && . ./.llmtrain/env && set +a; }
command -v "$python" >/dev/null || fail "there is no $python yet: llmtrain launch ssh init"
PYTHONPATH=".llmtrain/package${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m llmtrain "$@"
