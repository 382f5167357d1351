# Make the environment, or bring it up to date: uv, Python, the packages of stdin. Says each step on stderr.
python=$1
enter
[ ! -e .llmtrain/env ] || { set -a && . ./.llmtrain/env && set +a; }
for name in "$(command -v uv)" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" .llmtrain/uv/bin/uv; do
  if [ -x "$name" ]; then
    uv=$name
    break
  fi
done
if [ -z "${uv-}" ]; then
  echo "installing uv" >&2
  python3 -m venv .llmtrain/uv && .llmtrain/uv/bin/pip install -q uv ||
    fail "uv cannot be installed there: install it by hand (docs.astral.sh/uv), or python3 with venv"
  uv=.llmtrain/uv/bin/uv
fi
if [ ! -x .llmtrain/venv/bin/python ]; then
  free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1000000) }')
  [ "$free" -ge 8 ] || fail "$folder has $free GB free, and the environment needs 8: make room, or name another folder"
  echo "making the environment $folder/.llmtrain/venv" >&2
  "$uv" venv -q --python "$python" .llmtrain/venv || fail "uv found no Python $python there"
fi
cat >.llmtrain/requirements.txt
"$uv" pip install -q --python .llmtrain/venv/bin/python -r .llmtrain/requirements.txt ||
  fail "the packages cannot be installed; uv says why above"
