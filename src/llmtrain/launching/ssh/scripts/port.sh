# Write the number of a free port; the argument is Python.
enter
case $1 in "~/"*) set -- "$HOME/${1#"~/"}" ;; esac
exec "$1" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
