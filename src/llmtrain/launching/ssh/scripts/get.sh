# Write a file below .llmtrain.
enter
[ ! -e ".llmtrain/$1" ] || cat ".llmtrain/$1"
