# Write the position of the log at which this begins, in a line; the log from there on; end with the job, as it ended.
# A position is a number of bytes, or -N: the last N lines. `once`: what is there now, without waiting.
state=.llmtrain/$1 at=$2 mode=$3
enter
[ -e "$state/log" ] || fail "nothing was started in $folder yet: llmtrain launch ssh train CONFIG"
if [ "$mode" = follow ]; then
  # The other side has gone when stdin ends: this must not wait here for ever.
  exec 3<&0
  (cat <&3; kill $$) >/dev/null 2>&1 &
  reader=$!
fi
case $at in
  -*) at=$(($(wc -c <"$state/log") - $(tail -n "${at#-}" "$state/log" | wc -c))) ;;
esac
echo "$at"
while :; do
  if [ "$mode" = follow ] && running "$state"; then over=; else over=yes; fi
  size=$(wc -c <"$state/log")
  if [ "$size" -gt "$at" ]; then
    tail -c "+$((at + 1))" "$state/log" | head -c "$((size - at))"
    at=$((size))
  fi
  [ -z "$over" ] || break
  sleep 0.5
done
[ "$mode" = follow ] || exit 0
kill "$reader" 2>/dev/null
[ -e "$state/exit" ] || exit 98
code=$(cat "$state/exit")
[ "$code" -lt 97 ] || [ "$code" -gt 98 ] || code=1
[ "$code" -ne 255 ] || code=1
exit "$code"
