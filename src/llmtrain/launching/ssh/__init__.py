"""Another machine by SSH: its environment, the project on it, one job there, and the runs back.

    remote.py       which machines and which folder: flags, the config's `remote`, REMOTE_HOST and so on
    quoting.py      one command line for every login shell
    connection.py   ssh: one script there, and what its failures mean
    copying.py      rsync: the project there, the runs back
    environment.py  Python and the packages there
    env_file.py     variables for the processes there
    job.py          a job in tmux there: start, follow, stop
    scripts/        what runs there, in POSIX sh

On a machine everything of llmtrain's own lies in FOLDER/.llmtrain:

    package/llmtrain   this program, as it is here
    venv, uv           the environment
    env                the variables of the env file, mode 0600
    train-0, eval-0    a job of this kind on this node: run, command, log, result, pid, session, name, exit
"""
