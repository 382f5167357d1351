# Start a job in tmux. Its script and its command lie in its folder already, as *.new.
state=.llmtrain/$1 session=$2 name=$3
enter
command -v tmux >/dev/null || fail "tmux is not installed there: apt-get install tmux"
running "$state" && fail "$(cat "$state/name") is running there already: stop it, or name another --dir"
[ -e .llmtrain/package/llmtrain/__main__.py ] || fail "llmtrain is not in $folder yet: llmtrain launch ssh push"
rm -f "$state/exit" "$state/pid" "$state/log" "$state/result"
mv -f "$state/command.new" "$state/command" && mv -f "$state/run.new" "$state/run"
: >"$state/log"
printf '%s\n' "$name" >"$state/name"
printf '%s\n' "$session" >"$state/session"
tmux new-session -d -s "$session" sh "$state/run" "$state" >&2 || fail "tmux could not start the job"
