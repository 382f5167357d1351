# Show the job's window.
state=.llmtrain/$1
enter
running "$state" || fail "no job is running in $folder; its log: llmtrain launch ssh logs"
TERM=${TERM:-xterm} exec tmux attach-session -t "=$(cat "$state/session")"
