# The other side of rsync, in a folder below the project's: `make` makes it first. rsync adds its own arguments.
place=$1 make=$2
shift 2
command -v rsync >/dev/null || fail "rsync is not installed there: apt-get install rsync"
umask 022
if [ "$make" = make ]; then
  mkdir -p "$folder" || fail "the folder $folder cannot be made there (for ~, the home there, write quotes: '~/project')"
  cd "$folder" && mkdir -p .llmtrain "$place" || fail "$folder/$place cannot be made"
fi
enter
cd "$place" 2>/dev/null || fail "there is no $place in $folder"
exec rsync "$@"
