# What is there: one NAME VALUE a line.
echo "system $(uname -sm)"
for tool in rsync tmux; do
  command -v $tool >/dev/null && echo "$tool yes"
done
nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sed 's/^/gpu /'
cd "$folder" 2>/dev/null || exit 0
printf 'folder %s\n' "$(pwd -P | tr '\n' ' ')"
df -Pk . | awk 'NR == 2 { printf "free %.0f\n", $4 * 1024 }'
state=.llmtrain/$1
[ -e "$state/name" ] || exit 0
printf 'name %s\n' "$(cat "$state/name")"
printf 'session %s\n' "$(cat "$state/session")"
if running "$state"; then
  echo 'state running'
elif [ -e "$state/exit" ]; then
  echo "state ended"
  echo "exit $(cat "$state/exit")"
else
  echo 'state lost'
fi
