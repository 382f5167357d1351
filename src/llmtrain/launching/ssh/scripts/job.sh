# The job itself, in tmux: what it writes goes to files, and the window shows the log. A signal is for the program alone.
state=$1
trap : HUP INT TERM
if [ -e .llmtrain/env ]; then
  set -a
  . ./.llmtrain/env
  set +a
fi
export PYTHONPATH=".llmtrain/package${PYTHONPATH:+:$PYTHONPATH}"
tail -n +1 -f "$state/log" &
viewer=$!
sh -c 'echo $$ >"$1/pid" && . "./$1/command"' sh "$state" >"$state/result" 2>>"$state/log" </dev/null
code=$?
echo "$code" >"$state/exit.new" && mv -f "$state/exit.new" "$state/exit"
kill "$viewer" 2>/dev/null
