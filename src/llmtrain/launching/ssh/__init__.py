"""Trains on other machines over SSH: copies the project, makes an environment, runs a job, copies the runs back.

"There" and "remote" mean the other machine, "here" and "local" this one.

    remote.py       which machines and which folder: flags, the config's `remote`, REMOTE_HOST and so on
    quoting.py      quotes command lines for any login shell
    connection.py   ssh: runs a script there, and explains failed connections
    copying.py      rsync: copies the project there, and runs back
    environment.py  Python and its packages there
    env_file.py     environment variables for the processes there
    group.py        the processes of one run over several machines
    job.py          a job in tmux there: start, follow, stop
    scripts/        what runs there, in POSIX sh

On the other machine, all files of llmtrain itself are in FOLDER/.llmtrain:

    package/llmtrain   a copy of this program
    venv, uv           the environment
    env                the variables of the env file, mode 0600
    train-0, eval-0    a job of this kind on this node: run, command, log, result, pid, session, name, exit
"""
