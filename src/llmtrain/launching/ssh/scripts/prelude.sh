# Before each script: $folder is set, the arguments are its own. POSIX sh.
unset CDPATH
fail() {
  printf 'llmtrain: %s\n' "$1" >&2
  exit 97
}
enter() {
  cd "$folder" 2>/dev/null || fail "there is no folder $folder yet: llmtrain launch ssh push"
}
running() {
  [ -s "$1/session" ] && [ ! -e "$1/exit" ] && tmux has-session -t "=$(cat "$1/session")" 2>/dev/null
}
