# Send SIGTERM to the job's program, which saves and ends.
state=.llmtrain/$1
enter
[ -e "$state/name" ] || fail "nothing was started in $folder"
running "$state" || exit 0
tries=0
while [ ! -s "$state/pid" ] && [ $tries -lt 20 ]; do
  sleep 0.2
  tries=$((tries + 1))
done
kill -TERM "$(cat "$state/pid")" 2>/dev/null
exit 0
