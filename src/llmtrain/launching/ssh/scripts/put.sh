# Write stdin to a file below .llmtrain that only its owner may read.
umask 077
mkdir -p "$folder" || fail "the folder $folder cannot be made"
enter
file=.llmtrain/$1
mkdir -p "${file%/*}" && rm -f "$file.new" && cat >"$file.new" && mv -f "$file.new" "$file" ||
  fail "$folder/$file cannot be written"
